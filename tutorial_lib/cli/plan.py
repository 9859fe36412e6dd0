"""``python -m tutorial_lib plan``: which layouts fit given devices, the fastest first, and why the others lose.

The arithmetic is :mod:`tutorial_lib.theory.plan`'s. Here are the command's arguments, the dimensions of a named model,
and the table. Without ``--model`` neither torch nor transformers is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
from typing import Any

from tutorial_lib.cli.options import add_model_config, model_of
from tutorial_lib.config import ConfigError
from tutorial_lib.config.checks import check_path
from tutorial_lib.theory.dimensions import Dimensions, derive
from tutorial_lib.theory.layouts import ENGINES, PRECISIONS, Cluster, Workload
from tutorial_lib.theory.plan import Candidate, backward_all_reduces, plan
from tutorial_lib.theory.remedies import remedies

FITS, NOTHING_FITS = 0, 2

_LEFT_OUT = (
    "Left out: fragmentation, CUDA's and NCCL's own memory (--headroom stands for them), latency of collectives, "
    "slower kernels on small shards, Adam on the device, reading data. GB are 1e9 bytes. Attention is taken to be "
    "fused. An estimate orders layouts; measure the one you choose."
)


_A100_TFLOPS = {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``plan``. ``--json`` is every command's own."""
    defaults = {field.name: field.default for field in dataclasses.fields(Cluster)}

    def number(flag: str, kind: Any, help: str, default: Any = None, **options: Any) -> None:
        parser.add_argument(
            flag, type=kind, help=help, default=default, metavar=flag.rpartition("-")[2].upper(), **options
        )

    parser.description = "Every dp x tp x ZeRO stage x offload on given GPUs: memory, traffic, step time. " + _LEFT_OUT
    parser.add_argument("--model", help="hub name, directory or embedded/...: its configuration gives the dimensions")
    add_model_config(parser)
    parser.add_argument(
        "--random-init", action="store_true", help="with --model-config, as for train; plan reads no weights anyway"
    )
    number(
        "--model-size", float, "parameters, such as 7e9; dimensions not given follow published models (GPT-3, LLaMA)"
    )
    for name in ("layers", "hidden", "heads", "vocabulary"):
        number(f"--{name}", int, f"with --model-size: {name} of the model")
    number("--gpus", int, "devices in all", required=True)
    number("--gpu-memory", float, "GB of one device", required=True)
    number("--seq-length", int, "tokens per sequence (default: 2048)", 2048)
    number("--micro-batch", int, "sequences per forward pass and data-parallel rank (default: 1)", 1)
    number("--global-batch", int, "sequences per optimizer step (default: micro-batch x gpus)")
    parser.add_argument("--precision", default="bf16", help=f"{', '.join(PRECISIONS)} (default: bf16)")
    parser.add_argument("--engine", default="deepspeed", help=f"{', '.join(ENGINES)} (default: deepspeed)")
    parser.add_argument(
        "--gradient-reduction", default="reduce_scatter",
        help="how stages 1 and 2 reduce gradients: reduce_scatter (default, the paper's), or all_reduce, twice the "
        "volume, as DeepSpeed does unless use_multi_rank_bucket_allreduce is false",
    )  # fmt: skip
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute activations in backward")
    number("--bucket-size", int, "elements of DeepSpeed's buckets (default: 500000000, DeepSpeed's own)", 500_000_000)
    number("--gpus-per-node", int, "devices of a node, which tp stays within (default: 8)", defaults["gpus_per_node"])
    number("--host-memory", float, "GB of a node's memory, for offload (default: 1000)", 1000.0)
    number("--gpu-tflops", float, "peak of one device in the run's precision (default: an A100's 312, in fp32 19.5)")
    number("--efficiency", float, "share of the peak that computing reaches (default: 0.45, an assumption)", 0.45)
    number("--bandwidth-within", float, "GB/s a device sends within its node (default: 300, A100 NVLink)", 300.0)
    number("--bandwidth-between", float, "GB/s, a device's share of its node's network (default: 25)", 25.0)
    number("--bandwidth-host", float, "GB/s between a device and its host (default: 25, PCIe 4.0 x16)", 25.0)
    number("--host-adam", float, "1e9 parameters/s that a node's Adam updates (default: 4, an assumption)", 4.0)
    number("--overlap", float, "share of dp traffic that computing can hide (default: 0.8, an assumption)", 0.8)
    number("--headroom", float, "share of device memory to keep free (default: 0.1, an assumption)", 0.1)


def main(options: argparse.Namespace) -> int:
    """Print the plan; returns 0, or 2 if nothing fits.

    Raises:
        ConfigError: impossible arguments.
    """
    _check_numbers(options)
    dimensions, num_params, source = _model(options)
    workload = Workload(
        num_params=num_params, dimensions=dimensions, seq_length=options.seq_length, micro_batch=options.micro_batch,
        global_batch=options.global_batch, precision=options.precision, bucket_size=options.bucket_size,
        checkpointing=options.activation_checkpointing, gradient_reduction=options.gradient_reduction,
    )  # fmt: skip
    tflops = options.gpu_tflops or _A100_TFLOPS.get(options.precision, 312.0)
    cluster = Cluster(
        gpus=options.gpus, gpu_memory=options.gpu_memory * 1e9, gpus_per_node=options.gpus_per_node,
        host_memory=options.host_memory * 1e9, gpu_flops=tflops * 1e12, efficiency=options.efficiency,
        within=options.bandwidth_within * 1e9, between=options.bandwidth_between * 1e9,
        host_link=options.bandwidth_host * 1e9, host_adam=options.host_adam * 1e9, overlap=options.overlap,
        headroom=options.headroom,
    )  # fmt: skip
    try:
        candidates = plan(workload, cluster, options.engine)
        advice = [] if candidates[0].fits else remedies(workload, cluster, options.engine)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if options.json:
        print(json.dumps(_document(workload, cluster, options.engine, source, candidates, advice), indent=2))
    else:
        print(_text(workload, cluster, options.engine, source, candidates, advice))
    return FITS if candidates[0].fits else NOTHING_FITS


def from_config(config: Any) -> Dimensions:
    """The dimensions that a model's configuration (transformers' ``PretrainedConfig``) states.

    Raises:
        ConfigError: a family whose parameters are not counted here.
    """
    family = config.model_type
    shared: dict[str, Any] = {
        "layers": config.num_hidden_layers, "hidden": config.hidden_size, "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size, "tied": config.tie_word_embeddings,
    }  # fmt: skip
    if family == "gpt2":
        return Dimensions(
            **shared, positions=config.n_positions, intermediate=config.n_inner, qkv_bias=True, bias=True,
            norm_vectors=2,
        )  # fmt: skip
    if family == "bloom":
        return Dimensions(**shared, qkv_bias=True, bias=True, norm_vectors=2, embedding_norm=True)
    plain = getattr(config, "head_dim", None) in (None, config.hidden_size // config.num_attention_heads)
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if family in ("llama", "mistral", "qwen2") and plain and not biased:
        return Dimensions(
            **shared, kv_heads=config.num_key_value_heads, intermediate=config.intermediate_size, gated=True,
            qkv_bias=family == "qwen2", column_layers=5,
        )  # fmt: skip
    raise ConfigError(
        f"The parameters of this {family} model are not counted by plan, which knows gpt2, bloom, llama, mistral and "
        "qwen2. Write --model-size with --layers, --hidden, --heads and --vocabulary instead of --model."
    )


def _check_numbers(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} is {value}; write a finite number.")
        if isinstance(value, float) and value <= 0 and name not in ("overlap", "headroom"):
            raise ConfigError(f"{flag} is {value:g}; write a number above 0.")
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"{flag} is {value}; the smallest possible value is 1.")


def _model(options: argparse.Namespace) -> tuple[Dimensions, int, str]:
    given = {name: getattr(options, name) for name in ("layers", "hidden", "heads", "vocabulary")}
    model = model_of(options)
    if (model is None) == (options.model_size is None):
        raise ConfigError("Write either --model NAME or --model-size PARAMETERS, such as --model-size 7e9.")
    if model is not None:
        if named := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"--{named[0]} goes with --model-size; the dimensions of {model} are its own.")
        from tutorial_lib.models import load_config

        check_path("model", model)
        dimensions = from_config(load_config(model))
        return dimensions, dimensions.num_params, model
    try:
        dimensions = derive(options.model_size, **given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if all(given.values()):
        return dimensions, int(options.model_size), "as given"
    return dimensions, int(options.model_size), "assumed, after GPT-3's and LLaMA's sizes"


def _document(
    workload: Workload, cluster: Cluster, engine: str, source: str, candidates: list[Candidate], advice: list[str]
) -> dict[str, Any]:
    rows = [
        {
            **{key: value for key, value in dataclasses.asdict(c).items() if key != "layout"},
            **dataclasses.asdict(c.layout), "name": c.layout.name, "fits": c.fits, "memory": c.memory,
            "seconds": c.seconds,
        }
        for c in candidates
    ]  # fmt: skip
    return {
        "units": "bytes per GPU (host: per node), bytes sent per GPU and step, seconds per step",
        "engine": engine, "dimensions_from": source, "workload": dataclasses.asdict(workload),
        "replicated_params": workload.dimensions.replicated_params,
        "backward_all_reduces": backward_all_reduces(workload.dimensions, engine),
        "cluster": dataclasses.asdict(cluster),
        "best": rows[0] if candidates[0].fits else None, "candidates": rows, "advice": advice, "left_out": _LEFT_OUT,
    }  # fmt: skip


def _text(
    workload: Workload, cluster: Cluster, engine: str, source: str, candidates: list[Candidate], advice: list[str]
) -> str:
    dims, best = workload.dimensions, candidates[0]
    batch = workload.global_batch or workload.micro_batch * cluster.gpus
    lines = [
        f"{workload.num_params / 1e9:.4g} B parameters, {workload.precision}: {dims.layers} layers, hidden "
        f"{dims.hidden}, {dims.heads} heads ({dims.key_value_heads} kv), vocabulary {dims.vocabulary}",
        f"  dimensions: {source}; replicated under tp: {dims.replicated_params / 1e6:.3g} M",
        f"{cluster.gpus} GPUs of {cluster.gpu_memory / 1e9:g} GB ({cluster.usable_memory / 1e9:.3g} usable), "
        f"{cluster.gpus_per_node} per node; {cluster.gpu_flops / 1e12:g} TFLOP/s at {cluster.efficiency:g}",
        f"  GB/s: {cluster.within / 1e9:g} within a node, {cluster.between / 1e9:g} between, "
        f"{cluster.host_link / 1e9:g} to the host; {cluster.host_memory / 1e9:g} GB of host memory per node",
        f"  assumed: {cluster.overlap:.0%} of dp traffic can hide behind computing, {cluster.headroom:.0%} of memory "
        f"free, host Adam {cluster.host_adam / 1e9:g}e9/s",
        f"  {batch} sequences of {workload.seq_length} per step, micro-batch {workload.micro_batch}"
        + (", activations recomputed" if workload.checkpointing else ""),
        *_communication(workload, engine),
        "",
        f"{'GB per GPU':>50}{'GB sent/step':>14}",
        " dp tp sharding      off  states activ  bufs  total    dp    tp  s/step  why not",
        *(_row(candidate, best) for candidate in candidates),
    ]
    lines.append("")
    if best.fits:
        fitting = sum(candidate.fits for candidate in candidates)
        layout = best.layout
        speed = batch * workload.seq_length / best.seconds / cluster.gpus
        lines += [
            f"Best: dp={layout.dp} tp={layout.tp} {layout.name}, offload {layout.offload}: the fastest of {fitting} "
            f"that fit, of {len(candidates)}.",
            f"{speed:,.0f} tokens/s per GPU, accumulation {best.accumulation}; computing is "
            f"{best.compute_seconds / best.seconds:.0%} of its step.",
        ]
    else:
        hopeless = (
            "This planner knows no layout that fits, on any number of such GPUs: choose larger ones or shorter "
            "sequences. Context parallelism or a loss in chunks, which it does not know, may help."
        )
        lines.append(f"Nothing fits. {'What would:' if advice else hopeless}")
        lines += [f"  {sentence}" for sentence in advice]
    return "\n".join([*lines, "", *textwrap.wrap(_LEFT_OUT, 100)])


def _communication(workload: Workload, engine: str) -> list[str]:
    """What is assumed of tensor parallelism's all-reduces, and of how gradients are reduced."""
    backward = backward_all_reduces(workload.dimensions, engine)
    forward = "2 forward, 1 recomputed" if workload.checkpointing else "2 forward"
    tp = f"  all-reduces per layer: {forward}, {backward} backward"
    if engine == "fsdp":
        return [f"{tp} (Megatron's plan)", "  gradients: reduced in fp32, once per step"]
    reduction = workload.gradient_reduction
    default = "DeepSpeed's default" + (": --gradient-reduction all_reduce" if reduction != "all_reduce" else "")
    return [
        f"{tp} (AutoTP: {backward} column-parallel layers)",
        f"  gradients of stages 1 and 2: {reduction} ({default})",
    ]


def _row(candidate: Candidate, best: Candidate) -> str:
    layout = candidate.layout
    off = {"none": "-", "optimizer": "opt", "all": "all"}[layout.offload]
    gigabytes = [
        _short(size / 1e9)
        for size in (candidate.states, candidate.activations, candidate.buffers, candidate.memory,
                     candidate.dp_traffic, candidate.tp_traffic)
    ]  # fmt: skip
    columns = " ".join(f"{text:>{width}}" for text, width in zip(gigabytes, (6, 5, 5, 6, 5, 5), strict=True))
    why = candidate.problem or candidate.slower or "the best"
    return f"{layout.dp:>3} {layout.tp:>2} {layout.name:13} {off:3} {columns} {_short(candidate.seconds):>7}  {why}"


def _short(number: float) -> str:
    """At most five characters, three digits that count."""
    if number == 0:
        return "0"
    if number < 0.001:
        return f"{number:.0e}".replace("e-0", "e-")
    decimals = 3 if number < 1 else 2 if number < 10 else 1 if number < 1000 else 0
    return f"{number:.{decimals}f}"
