"""Commands that run a plan's best layout: settings for ``train``, a DeepSpeed file, and the line that starts it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from tutorial_lib.theory.cost import Candidate
from tutorial_lib.theory.layouts import Cluster, Workload

DEEPSPEED_FILE = "ds_config.json"


def settings_of(workload: Workload, best: Candidate, model: str, *, random_init: bool = False) -> dict[str, Any]:
    """Return the settings of ``train`` by flat name, for :meth:`tutorial_lib.config.Config.create`.

    Args:
        workload: the planned training.
        best: a candidate that this course's engines can run (:attr:`Candidate.missing` is empty).
        model: name of the model.
        random_init: whether to start from random weights.
    """
    layout = best.layout
    found: dict[str, Any] = {
        "model": model, "engine": layout.engine, "dp": layout.dp, "tp": layout.tp, "precision": workload.precision,
        "seq_length": workload.seq_length, "batching": "packed",
        "global_batch": best.tokens // workload.seq_length, "micro_batch": layout.micro_batch,
        "activation_checkpointing": layout.checkpointing != "none",
    }  # fmt: skip
    if layout.checkpointing == "selective":
        found["recompute"] = "selective"
    if random_init:
        found["random_init"] = True
    if workload.loss_chunks > 1:
        found["loss_chunks"] = workload.loss_chunks
    if layout.strategy is None:
        found |= {"zero_stage": layout.zero_stage, "offload": layout.offload}
        if layout.zero_stage:
            found["bucket_size"] = workload.bucket_size
    else:
        found |= {"sharding": "hybrid_shard" if layout.strategy == "hybrid" else layout.strategy}
        if layout.shard_size:
            found["shard_size"] = layout.shard_size
        if layout.reduction == "each" and best.accumulation > 1:
            found["reduce_each"] = True
        if layout.offload != "none":
            found["offload"] = layout.offload
    return found


def deepspeed_config(workload: Workload, best: Candidate) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of a candidate, for a JSON file, or None if its engine is FSDP."""
    layout = best.layout
    if layout.strategy is not None:
        return None
    zero: dict[str, Any] = {"stage": layout.zero_stage}
    if layout.zero_stage:
        zero["reduce_bucket_size"] = workload.bucket_size
    if layout.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = workload.bucket_size + workload.bucket_size % 2  # DeepSpeed refuses odd numbers
        if workload.gradient_reduction == "reduce_scatter":
            zero["use_multi_rank_bucket_allreduce"] = False
    if layout.zero_stage == 3:
        zero["stage3_max_live_parameters"] = workload.live_params
    if layout.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if layout.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_batch_size": best.tokens // workload.seq_length,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": best.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
    }
    if workload.precision != "fp32":
        config[workload.precision] = {"enabled": True}
    return config


def train_line(cluster: Cluster, settings: dict[str, Any], *, with_file: bool) -> str:
    """Return the line that starts the run: plain for one GPU, torchrun on one node, or one torchrun per node.

    Args:
        cluster: the devices.
        settings: from :func:`settings_of`.
        with_file: whether the run gets a DeepSpeed file; the line does not repeat the settings that the file holds.
    """
    # The precision stays on the line: the file has no key for fp32.
    in_file = {"zero_stage", "offload", "bucket_size"} if with_file else set()
    flags = ["--profile", "gpu" if cluster.gpus == 1 else "cluster"]
    for name, value in settings.items():
        if name in in_file or value is False or (name == "tp" and value == 1):
            continue
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if with_file:
        flags += ["--deepspeed", DEEPSPEED_FILE]
    words = ["-m", "tutorial_lib", "train", *flags]
    if cluster.gpus == 1:
        return shlex.join(["python", *words])
    nodes = cluster.gpus // cluster.per_node
    start = ["torchrun", "--nproc-per-node", str(cluster.per_node)]
    if nodes == 1:
        return shlex.join([*start, "--standalone", *words])
    place = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-id plan --rdzv-endpoint $HEAD_NODE:29500"
    return f"{shlex.join(start)} {place} {shlex.join(words)}"


def in_words(
    workload: Workload, cluster: Cluster, best: Candidate, model: str, *, random_init: bool = False
) -> list[str]:
    """Return the lines to paste: the command, and the content of its DeepSpeed file, if it needs one."""
    config = deepspeed_config(workload, best)
    settings = settings_of(workload, best, model, random_init=random_init)
    line = train_line(cluster, settings, with_file=config is not None)
    each = " (on every node)" if cluster.gpus > cluster.per_node else ""
    lines = [f"To run it{each}:", f"  {line}"]
    if config is not None:
        lines += [f"with {DEEPSPEED_FILE}:", *(f"  {row}" for row in json.dumps(config, indent=2).splitlines())]
    return lines
