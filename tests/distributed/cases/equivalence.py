"""Equivalent runs: a case is a training problem; a variant is a way to solve it that must not change the result.

``make matrix`` runs every valid combination of the two. ``make test`` runs fewer: :mod:`.pairwise` chooses them so that
they still contain every pair of settings that occurs in a valid combination.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.cases.pairwise import cover
from tests.distributed.cases.small_runs import config
from tutorial_lib.config import Config

MATRIX = os.environ.get("MATRIX") == "1"
"""True if every valid combination is run, which ``make matrix`` asks for."""

CASES: dict[str, dict[str, Any]] = {
    # The embeddings are tied, rows have different lengths on each rank, and every step's norm exceeds the limit.
    "gpt2": {"model": "gpt2", "gradient_clipping": 0.5},
    # AutoTP splits this model. It has grouped key-value heads and tied embeddings; every step's norm exceeds the limit.
    "qwen2": {"model": "qwen2", "gradient_clipping": 0.5, "evaluate": True, "max_eval_examples": 12},
    # Only the answer in each row counts, which is a few tokens. Decay is four times the usual, nothing is clipped, and
    # the learning rate changes.
    "untied": {
        "model": "qwen2-untied", "random_init": True, "dataset": "embedded/qa", "seq_length": 128,
        "weight_decay": 0.04, "gradient_clipping": 0.0, "schedule": "cosine", "warmup_steps": 1,
    },
    # ALiBi, and rows that hold several documents.
    "bloom": {"model": "bloom", "batching": "packed", "seq_length": 128},
    # One rank may hold 60 times the tokens of another.
    "uneven": {"model": "qwen2", "dataset": "uneven", "batching": "max_length", "global_batch": 4},
    # This case has Adam's usual epsilon. ``small_runs.COMMON`` says why the others have a larger one.
    "usual": {"model": "gpt2", "eps": 1e-8},
    "frozen-split": {"model": "qwen2", "freeze": ("*.k_proj.*", "*.layers.0.*", "*.norm.weight")},
    # No number of ranks divides the vocabulary, so shards have different sizes.
    "odd": {"model": "gpt2-odd", "random_init": True},
    "frozen": {"model": "gpt2", "freeze": ("*.wpe.weight", "*.h.0.*"), "activation_checkpointing": True},
    # Buffers that are stored with the parameters scale each layer's output.
    "scaled": {"model": "scaled"},
}  # fmt: skip

STAGES: dict[str, dict[str, Any]] = {f"zero{stage}": {"zero_stage": stage} for stage in range(4)}
OFFLOADED: dict[str, dict[str, Any]] = {
    "zero1-optimizer": {"zero_stage": 1, "offload": "optimizer"},
    "zero2-optimizer": {"zero_stage": 2, "offload": "optimizer"},
    "zero3-optimizer": {"zero_stage": 3, "offload": "optimizer"},
    "zero3-all": {"zero_stage": 3, "offload": "all"},
}
# Two micro-batches per step on 4 ranks, four on 2, eight on one.
ACCUMULATED = {f"{name}-accumulated": {**flat, "micro_batch": 1} for name, flat in STAGES.items()} | {
    f"{name}-accumulated": {**OFFLOADED[name], "micro_batch": 1} for name in ("zero2-optimizer", "zero3-all")
}
RECOMPUTED = {"zero1-recomputed": {"zero_stage": 1, "activation_checkpointing": True}}
_SELECTIVE: dict[str, Any] = {"activation_checkpointing": True, "recompute": "selective"}
SELECTIVE = {
    "zero1-selective": {"zero_stage": 1, **_SELECTIVE},
    "zero3-selective": {"zero_stage": 3, **_SELECTIVE},
    "fsdp-full-selective": {"engine": "fsdp", "measure": True, **_SELECTIVE},
}
BF16 = {f"{name}-bf16": {**flat, "precision": "bf16"} for name, flat in STAGES.items()}


def split(dp: int, tp: int, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the variants on a grid with a tensor-parallel axis."""
    return {f"{dp}x{tp}-{name}": {**flat, "dp": dp, "tp": tp, "measure": True} for name, flat in variants.items()}


def only(variants: dict[str, dict[str, Any]], *names: str) -> dict[str, dict[str, Any]]:
    return {name: variants[name] for name in names}


_FSDP: dict[str, Any] = {"engine": "fsdp", "measure": True}
SHARDED: dict[str, dict[str, Any]] = {
    "fsdp-full": _FSDP,
    "fsdp-grad": {**_FSDP, "sharding": "SHARD_GRAD_OP"},
    "fsdp-none": {**_FSDP, "sharding": "no_shard"},
}
HYBRID = {"fsdp-hybrid": {**_FSDP, "sharding": "hybrid_shard", "shard_size": 2}}
# As many data-parallel ranks as the number of ranks allows: 1 x 2, 2 x 2, 1 x 4.
SPLIT: dict[str, dict[str, Any]] = {"fsdp-tp2": {**_FSDP, "tp": 2}, "fsdp-tp4": {**_FSDP, "tp": 4}}
FSDP_ACCUMULATED = {f"{name}-accumulated": {**SHARDED[name], "micro_batch": 1} for name in ("fsdp-full", "fsdp-none")}
EACH = {"fsdp-full-each": {**_FSDP, "micro_batch": 1, "reduce_each": True}}
FSDP_BF16 = {f"{name}-bf16": {**SHARDED[name], "precision": "bf16"} for name in ("fsdp-full", "fsdp-none")}

VALID: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    1: {
        "gpt2": STAGES | OFFLOADED,
        "untied": {"zero3-accumulated": ACCUMULATED["zero3-accumulated"]},
    },
    2: {
        "gpt2": STAGES
        | OFFLOADED
        | ACCUMULATED
        | BF16
        | SHARDED
        | FSDP_ACCUMULATED
        | EACH
        | FSDP_BF16
        | {
            "fsdp-tp2": SPLIT["fsdp-tp2"],
            "fsdp-full-all": {**_FSDP, "offload": "all"},
            "fsdp-full-root": {**_FSDP, "wrap": "root"},
        },
        "qwen2": split(
            1,
            2,
            STAGES
            | only(OFFLOADED, "zero2-optimizer", "zero3-all")
            | only(BF16, "zero1-bf16")
            | RECOMPUTED
            | only(SELECTIVE, "zero1-selective"),
        )
        | only(SPLIT, "fsdp-tp2")
        | only(SELECTIVE, "fsdp-full-selective"),
        "untied": STAGES
        | only(OFFLOADED, "zero3-all")
        | split(1, 2, only(STAGES, "zero2"))
        | only(SPLIT, "fsdp-tp2")
        | {"fsdp-tp2-plain": {**SPLIT["fsdp-tp2"], "tp_plan": "plain"}},
        "bloom": STAGES
        | split(1, 2, STAGES)
        | {"fsdp-full": _FSDP}
        | only(SPLIT, "fsdp-tp2")
        | only(SELECTIVE, "zero3-selective", "fsdp-full-selective"),
        "uneven": STAGES | only(ACCUMULATED, "zero2-accumulated") | only(SHARDED, "fsdp-grad"),
        "usual": {name: STAGES[name] for name in ("zero0", "zero3")},
        "odd": {"fsdp-full": _FSDP},
        "scaled": only(STAGES, "zero3") | only(SHARDED, "fsdp-full", "fsdp-none"),
        "frozen": STAGES
        | {
            "zero2-optimizer": OFFLOADED["zero2-optimizer"],
            "fsdp-full": _FSDP,
            "fsdp-none": SHARDED["fsdp-none"],
            "fsdp-tp2": SPLIT["fsdp-tp2"],
        },
        "frozen-split": split(1, 2, only(STAGES, "zero0", "zero3")),
    },
    4: {
        "gpt2": STAGES
        | only(ACCUMULATED, "zero2-accumulated", "zero3-all-accumulated")
        | SPLIT
        | HYBRID
        | only(SHARDED, "fsdp-none")
        | {
            "fsdp-tp2-accumulated": {**SPLIT["fsdp-tp2"], "micro_batch": 1},
            "fsdp-hybrid-each": {**HYBRID["fsdp-hybrid"], "micro_batch": 1, "reduce_each": True},
        },
        "qwen2": split(2, 2, STAGES | only(ACCUMULATED, "zero2-accumulated", "zero3-accumulated"))
        | split(1, 4, STAGES)
        | SPLIT,
        "untied": only(STAGES, "zero1", "zero3")
        | split(2, 2, only(STAGES, "zero0", "zero1", "zero3"))
        | SPLIT
        | HYBRID,
        "bloom": only(STAGES, "zero3") | split(2, 2, STAGES) | split(1, 4, STAGES) | SPLIT,
        "uneven": STAGES | only(SHARDED, "fsdp-full", "fsdp-grad"),
        "usual": {"zero2": STAGES["zero2"]},
        "frozen-split": split(2, 2, only(STAGES, "zero1", "zero3")),
        "odd": {"fsdp-full": _FSDP, "fsdp-tp2": SPLIT["fsdp-tp2"]},
        "scaled": HYBRID,
        "frozen": {"zero2": STAGES["zero2"]},
    },
}
"""Variants that must equal the case's reference, by number of ranks and case."""

Combination = tuple[int, str, str]
"""The number of ranks, the case and the variant."""

VALID_COMBINATIONS: list[Combination] = [
    (ranks, case, name) for ranks, by_case in VALID.items() for case, variants in by_case.items() for name in variants
]


def settings(combination: Combination) -> dict[str, Any]:
    """Return the settings that distinguish a combination from others, with None for defaults."""
    ranks, case, name = combination
    known = {
        key for variants in VALID.values() for flats in variants.values() for flat in flats.values() for key in flat
    }
    flat = VALID[ranks][case][name]
    return {"ranks": ranks, "case": case} | {key: flat.get(key) for key in known - {"dp", "measure"}}


def run_name(combination: Combination) -> str:
    ranks, case, name = combination
    return f"{case}.{name}.{ranks}"


NEEDED = {
    # Some tests ask for these runs by name. The fault-free counterparts of MUTANTS are needed, too.
    "untied.zero3-accumulated.1",
    "gpt2.zero2-accumulated.2",
    "gpt2.zero1.2",
    "gpt2.fsdp-full.2", "gpt2.fsdp-grad.2", "gpt2.fsdp-none.2",
    "gpt2.fsdp-full-root.2", "gpt2.fsdp-full-accumulated.2", "gpt2.fsdp-full-bf16.2",
    "qwen2.1x2-zero1-recomputed.2", "qwen2.1x2-zero1-selective.2", "qwen2.fsdp-full-selective.2",
    "gpt2.fsdp-full-each.2", "bloom.zero3-selective.2",  # layers with biases, after ZeRO-3 replaced the linear function
    "frozen.fsdp-full.2",
    "gpt2.zero2-accumulated.4", "gpt2.fsdp-tp2.4", "gpt2.fsdp-hybrid.4",
    "qwen2.2x2-zero0.4", "qwen2.2x2-zero1.4", "untied.2x2-zero1.4", "bloom.2x2-zero1.4",
    "uneven.zero2.4",
    "odd.fsdp-full.4",
}  # fmt: skip

MUTANTS = {
    "data.same_data_on_each_rank": ("gpt2", "zero1"),
    "data.sharded_over_a_larger_grid": ("gpt2", "zero2"),
    "data.padding_in_the_loss": ("gpt2", "zero3"),
    "update.clipping_dropped": ("gpt2", "zero2"),
    "update.clipping_left_to_the_default": ("gpt2", "zero0"),
    "update.mean_of_means": ("uneven", "zero2"),
    "update.loss_of_own_tokens": ("uneven", "zero1"),
    "update.gradients_summed": ("untied", "zero1"),
    "update.gradients_averaged_twice": ("gpt2", "zero3"),
    "update.trial_step_kept": ("gpt2", "zero0-bf16"),
    "tensor_parallel.column_all_reduce_skipped": ("qwen2", "1x2-zero1"),
    "tensor_parallel.columns_not_moved": ("gpt2", "fsdp-tp2"),
    "tensor_parallel.replicated_gradients_counted_twice": ("gpt2", "fsdp-tp2"),
    "tensor_parallel.slopes_of_the_first_heads": ("bloom", "fsdp-tp2"),
}
"""Deliberate faults that the comparison with a reference must expose, with the case and variant of each on two ranks.

The run with a fault has the fault's name.
"""


def combinations() -> list[Combination]:
    """Return the combinations to run: all valid ones, or enough to cover every pair of settings."""
    if MATRIX:
        return VALID_COMBINATIONS
    without_faults = {run_name((2, *origin)) for origin in MUTANTS.values()} | {"gpt2.zero1-bf16.2"}
    needed = [each for each in VALID_COMBINATIONS if run_name(each) in NEEDED | without_faults]
    assert len(needed) == len(NEEDED | without_faults), "NEEDED or MUTANTS names an invalid combination"
    return cover({each: settings(each) for each in VALID_COMBINATIONS}, needed)


COMBINATIONS = combinations()
VARIANTS = {
    ranks: {
        case: {name: flat for name, flat in variants.items() if (ranks, case, name) in COMBINATIONS}
        for case, variants in by_case.items()
    }
    for ranks, by_case in VALID.items()
}
"""The combinations of ``VALID`` that are run."""


def among_runs(listed: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Keep the tuples whose run is selected. A tuple starts with the number of ranks and the run's name."""
    run = {*map(run_name, COMBINATIONS), *(f"{case}.reference" for case in CASES)}
    known = run | {*map(run_name, VALID_COMBINATIONS)}
    assert all(name in known for _, name, *_ in listed), listed
    return [each for each in listed if each[1] in run]


def variant(directory: Path, case: str, variant: str, ranks: int, **changes: Any) -> Config:
    """Return a run that must equal the case's reference."""
    flat = {**CASES[case], **VALID[ranks][case][variant], **changes}
    return config(directory, **{"name": f"{case}.{variant}.{ranks}", "dp": ranks // flat.get("tp", 1), **flat})


def reference(directory: Path, case: str) -> Config:
    """Return the run of a case in one process with plain torch."""
    return config(directory, name=f"{case}.reference", engine="torch", dp=1, **CASES[case])


SELF_DETECTED_FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "data.sampler_of_the_world": ("qwen2", "1x2-zero1", {"evaluate": False}),
    "tensor_parallel.seed_of_each_rank": ("bloom", "1x2-zero2", {"model": "bloom-dropout"}),
    "tensor_parallel.row_all_reduce_skipped": ("qwen2", "1x2-zero2", {"evaluate": False}),
    "tensor_parallel.projections_not_split": ("qwen2", "1x2-zero3", {}),
}
"""Deliberate faults that the run itself detects, with the case, variant and changes of each on two ranks."""

ONE_STEP_WITHOUT_UPDATE: dict[str, dict[str, Any]] = {
    "drawn-gpt2": {"model": "gpt2", "random_init": True},
    "drawn-qwen2": {"model": "qwen2", "random_init": True, "seed": 7},
    "read-bloom": {"model": "bloom"},
}
"""Runs on 2 x 2 ranks with one step that changes nothing, so that their final weights equal the initial ones."""


def one_step_without_update(directory: Path, name: str) -> Config:
    still = {"learning_rate": 0.0, "steps": 1, "engine": "fsdp", "dp": 2, "tp": 2}
    return config(directory, name=f"one_step_without_update.{name}", **still, **ONE_STEP_WITHOUT_UPDATE[name])
