"""Nine ordinary questions, answered as an expert would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tutorial_lib.theory.cost import Candidate
from tutorial_lib.theory.dimensions import derive
from tutorial_lib.theory.hardware import GPUS
from tutorial_lib.theory.known_models import MODELS
from tutorial_lib.theory.layout_reasons import reasons
from tutorial_lib.theory.layouts import Cluster, Workload
from tutorial_lib.theory.plan import plan
from tutorial_lib.theory.remedies import remedies


def cluster(gpus: int, gpu: str = "a100-80", **changes: Any) -> Cluster:
    preset = GPUS[gpu]
    return Cluster(
        **{
            "gpus": gpus, "gpu_memory": preset.memory, "gpu_flops": preset.flops["bf16"],
            "efficiency": preset.efficiency, "memory_bandwidth": preset.memory_bandwidth,
            "intra_node_bandwidth": preset.intra_node_bandwidth, "inter_node_bandwidth": preset.inter_node_bandwidth,
            "host_link": preset.host_link, **changes,
        }
    )  # fmt: skip


def work(model: str | float, seq_length: int = 2048, **changes: Any) -> Workload:
    dims = MODELS[model] if isinstance(model, str) else derive(model)
    size = dims.num_params if isinstance(model, str) else int(model)
    return Workload(num_params=size, dimensions=dims, seq_length=seq_length, **changes)


def best(task: Workload, machine: Cluster, engine: str = "fsdp") -> Candidate:
    found = plan(task, machine, engine)[0]
    assert found.fits
    return found


def test_seven_billion_on_eight_of_80_gb() -> None:
    """An expert chooses ZeRO or FSDP, without tensor parallelism, offload or full recomputation."""
    for engine in ("deepspeed", "fsdp"):
        layout = best(work(7e9), cluster(8), engine).layout
        assert (layout.dp, layout.tp, layout.offload) == (8, 1, "none")
        assert layout.checkpointing != "full" and layout.zero_stage >= 1


def test_one_billion_on_eight_of_80_gb() -> None:
    """The model fits one GPU, so the plan is DDP."""
    assert best(work(1e9, micro_batch=8), cluster(8), "fsdp").layout.strategy == "no_shard"


def test_half_a_billion_on_one_of_24_gb() -> None:
    """An expert trains without sharding, with the largest micro-batch that is worth its memory."""
    found = best(work(0.5e9), cluster(1, "rtx4090"), "fsdp")
    assert found.layout.strategy == "no_shard" and found.layout.offload == "none"
    assert 2 <= found.layout.micro_batch <= 8 and found.layout.checkpointing == "none"


def test_thirty_billion_on_eight_of_80_gb_is_not_offloaded() -> None:
    for allow_missing in (True, False):
        assert best(work(30e9, allow_missing=allow_missing), cluster(8), "fsdp").layout.offload == "none"
    alone = best(work(30e9, allow_missing=False), cluster(16), "deepspeed").layout
    assert alone.offload == "none"


def test_seventy_billion_on_64_of_80_gb() -> None:
    """States are fully sharded, layers recomputed, and nothing offloaded. At 8,192 tokens, FSDP splits layers, too."""
    for engine, tokens in (("fsdp", 2048), ("fsdp", 8192), ("deepspeed", 2048), ("deepspeed", 8192)):
        layout = best(work("llama-3-70b", tokens), cluster(64), engine).layout
        assert layout.offload == "none" and layout.checkpointing != "none" and layout.zero_stage == 3
    long = best(work("llama-3-70b", 8192), cluster(64), "fsdp").layout
    assert long.tp > 1 and long.sequence_parallel


def test_seventy_billion_with_a_large_batch_reduces_with_every_micro_batch() -> None:
    """The planner once let full gradients wait, and chose tp=8 with everything offloaded, at 164 tokens/s."""
    task = work("llama-3-70b", global_batch=1024)
    found = best(task, cluster(64), "fsdp")
    (sentence,) = [text for text in reasons(task, cluster(64), found) if text.startswith("Gradients are reduced")]
    assert sentence.startswith("Gradients are reduced with every micro-batch: once per step is too large by")
    assert not found.missing
    assert found.layout.reduction == "each" and found.layout.offload == "none" and found.layout.tp == 1


def test_thirteen_billion_on_four_of_40_gb() -> None:
    """States of 208 GB do not fit 160 GB and are offloaded. Adapters would fit without offload, and train faster."""
    task, machine = work("llama-2-13b"), cluster(4, "a100-40")
    found = best(task, machine, "deepspeed")
    assert found.layout.offload != "none"
    adapters = best(replace(task, lora_rank=16), machine, "fsdp")
    assert adapters.layout.tp == 1 and adapters.layout.offload == "none"
    assert adapters.tokens_per_gpu_second > found.tokens_per_gpu_second
    advice = remedies(task, replace(machine, host_memory=50e9), "deepspeed")
    assert advice[0].change.startswith(("--lora", "--gpus", "GPUs with"))
    assert any(remedy.change.startswith("--lora") for remedy in advice)


def test_405_billion_on_512_of_80_gb() -> None:
    """An expert splits layers and sequences, shards fully and recomputes. The published layout must fit, too."""
    task, machine = work("llama-3-405b", 8192), cluster(512, "h100")
    layout = best(task, machine, "fsdp").layout
    assert layout.tp > 1 and layout.sequence_parallel and layout.checkpointing == "full" and layout.offload == "none"
    fitting = [c.layout for c in plan(task, machine, "fsdp") if c.fits]
    assert any(c.tp == 8 and c.pp == 8 for c in fitting) and any(c.tp == 8 and c.pp == 1 for c in fitting)


def test_seven_billion_at_131072_tokens_on_eight_of_80_gb() -> None:
    """An expert recomputes everything, with context parallelism, or with tensor parallelism and a split vocabulary."""
    task = work("llama-3-8b", 131_072)
    layout = best(task, cluster(8, "h100"), "fsdp").layout
    assert layout.checkpointing == "full" and layout.cp * layout.tp >= 4 and layout.offload == "none"
    here = replace(task, allow_missing=False)
    assert not plan(here, cluster(8), "fsdp")[0].fits
    assert "layouts that this course's engines do not have" in [
        remedy.change for remedy in remedies(here, cluster(8), "fsdp")
    ]


def test_reasons_are_given_and_name_alternatives() -> None:
    task, machine = work(7e9), cluster(8)
    sentences = reasons(task, machine, best(task, machine, "deepspeed"))
    assert sentences[0].startswith("ZeRO-1: ZeRO-0 is too large by")
    assert any(sentence.startswith("Nothing is recomputed: full recomputation is") for sentence in sentences)
    assert any(sentence.startswith("Micro-batch") for sentence in sentences)
