"""Runs to compare: a case is a training problem, a variant is a way to solve it that must not change the result.

``make matrix`` runs every valid combination of the two, ``make test`` those that :mod:`tests.distributed.pairwise`
chooses, so that every pair of settings that occurs in some valid combination is still run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.pairwise import cover
from tests.distributed.probe import Probe, ProbedRun
from tutorial_lib.config import Config
from tutorial_lib.embedded import model_directory
from tutorial_lib.models import load_model

MATRIX = os.environ.get("MATRIX") == "1"
"""True if every valid combination is run: ``make matrix`` sets it."""

STEPS = 4
"""One more than the step that is measured."""

LAYERS, HIDDEN = 2, 32
"""Layers and hidden size of the models below. Equality to 1e-6 needs no more."""

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 4},
    # Pairs of query heads share a key-value head, and four ranks get one of those each.
    "qwen2": {
        "num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS, "hidden_size": HIDDEN,
        "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "bloom": {"n_layer": LAYERS, "hidden_size": HIDDEN, "n_head": 8},
}  # fmt: skip
"""Smaller versions of the embedded models with random weights: the differences from the model of that name."""

DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1),
    "bloom": dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.1),
}

COMMON: dict[str, Any] = {
    "steps": STEPS,
    "global_batch": 8,
    "seq_length": 64,
    "max_examples": 160,
    "evaluate": False,
    # Some gradients are zero except for rounding (a key's bias shifts all scores equally). Adam divides by their size,
    # so the default of 1e-8 would turn noise into updates of normal size. This keeps updates continuous.
    "eps": 1e-4,
}

CASES: dict[str, dict[str, Any]] = {
    # Tied embeddings; lengths differ by rank; the norm is above the limit at every step.
    "gpt2": {"model": "gpt2", "gradient_clipping": 0.5},
    # What AutoTP splits: grouped key-value heads, tied embeddings; the norm is above the limit at every step.
    "qwen2": {"model": "qwen2", "gradient_clipping": 0.5, "evaluate": True, "max_eval_examples": 12},
    # Only answers count: a few tokens of each row. Four times the usual decay, no clipping, learning rate changing.
    "untied": {
        "model": "qwen2-untied", "random_init": True, "dataset": "embedded/qa", "seq_length": 128,
        "weight_decay": 0.04, "gradient_clipping": 0.0, "schedule": "cosine", "warmup_steps": 1,
    },
    # ALiBi, and rows that hold several documents.
    "bloom": {"model": "bloom", "batching": "packed", "seq_length": 128},
    # One rank may hold 60 times the tokens of another.
    "uneven": {"model": "qwen2", "dataset": "uneven", "batching": "max_length", "global_batch": 4},
    # Adam's usual epsilon, see COMMON.
    "usual": {"model": "gpt2", "eps": 1e-8},
    "frozen-split": {"model": "qwen2", "freeze": ("*.k_proj.*", "*.layers.0.*", "*.norm.weight")},
    # A vocabulary that no number of ranks divides: shards of unequal size.
    "odd": {"model": "gpt2-odd", "random_init": True},
    "frozen": {"model": "gpt2", "freeze": ("*.wpe.weight", "*.h.0.*"), "activation_checkpointing": True},
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
        | FSDP_BF16
        | {
            "fsdp-tp2": SPLIT["fsdp-tp2"],
            "fsdp-full-all": {**_FSDP, "offload": "all"},
            "fsdp-full-root": {**_FSDP, "wrap": "root"},
        },
        "qwen2": split(
            1, 2, STAGES | only(OFFLOADED, "zero2-optimizer", "zero3-all") | only(BF16, "zero1-bf16") | RECOMPUTED
        )
        | only(SPLIT, "fsdp-tp2"),
        "untied": STAGES
        | only(OFFLOADED, "zero3-all")
        | split(1, 2, only(STAGES, "zero2"))
        | only(SPLIT, "fsdp-tp2")
        | {"fsdp-tp2-plain": {**SPLIT["fsdp-tp2"], "tp_plan": "plain"}},
        "bloom": STAGES | split(1, 2, STAGES) | {"fsdp-full": _FSDP} | only(SPLIT, "fsdp-tp2"),
        "uneven": STAGES | only(ACCUMULATED, "zero2-accumulated") | only(SHARDED, "fsdp-grad"),
        "usual": {name: STAGES[name] for name in ("zero0", "zero3")},
        "odd": {"fsdp-full": _FSDP},
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
        | {"fsdp-tp2-accumulated": {**SPLIT["fsdp-tp2"], "micro_batch": 1}},
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
    """Return everything that distinguishes a combination from others, with None for defaults."""
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
    # Tests of one thing ask for these by name. The runs without the faults of MUTANTS are needed, too.
    "untied.zero3-accumulated.1",
    "gpt2.zero2-accumulated.2",
    "gpt2.zero1.2",
    "gpt2.fsdp-full.2", "gpt2.fsdp-grad.2", "gpt2.fsdp-none.2",
    "gpt2.fsdp-full-root.2", "gpt2.fsdp-full-accumulated.2", "gpt2.fsdp-full-bf16.2",
    "qwen2.1x2-zero1-recomputed.2",
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
"""Deliberate faults that the comparison with a reference must show: case and variant of each, on two ranks.

The run with a fault has the fault's name.
"""


def combinations() -> list[Combination]:
    """Return the combinations to run: all valid ones, or enough to cover every pair of settings."""
    if MATRIX:
        return VALID_COMBINATIONS
    without_faults = {run_name((2, *origin)) for origin in MUTANTS.values()} | {"gpt2.zero1-bf16.2"}
    needed = [each for each in VALID_COMBINATIONS if run_name(each) in NEEDED | without_faults]
    assert len(needed) == len(NEEDED | without_faults), "each name is the name of a valid combination"
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
    """Keep the tuples (number of ranks, name of a run, and more) whose run is one of those that are run."""
    run = {*map(run_name, COMBINATIONS), *(f"{case}.reference" for case in CASES)}
    known = run | {*map(run_name, VALID_COMBINATIONS)}
    assert all(name in known for _, name, *_ in listed), listed
    return [each for each in listed if each[1] in run]


def make_inputs(directory: Path) -> None:
    """Create models and data that are not embedded."""
    for name, smaller in MODELS.items():
        small_model(name, directory / name, **smaller)
    for name, rates in DROPOUT.items():
        small_model(name, directory / f"{name}-dropout", **MODELS[name], **rates)
    altered_model("embedded/gpt2", directory / "gpt2-dropout-slow", **DROPOUT["gpt2"])
    without_weights("qwen2", directory / "qwen2-untied", **MODELS["qwen2"], tie_word_embeddings=False)
    without_weights("gpt2", directory / "gpt2-odd", **MODELS["gpt2"], vocab_size=2049)
    uneven = directory / "uneven"
    uneven.mkdir()
    texts = [("word " * 60 if number % 3 == 0 else "word ") + str(number) for number in range(64)]
    for split in ("train", "validation"):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (uneven / f"{split}.jsonl").write_text(rows)


def small_model(name: str, target: Path, **changes: Any) -> None:
    """Write an altered model with random weights to a file, the same ones each time."""
    without_weights(name, target, **changes)
    load_model(str(target), random_init=True).save_pretrained(target)


def without_weights(name: str, target: Path, **changes: Any) -> None:
    # Make logits distinguish tokens, as trained ones do: with the usual weights, all are about equally likely.
    altered_model(f"embedded/{name}", target, initializer_range=0.2, **changes)
    (target / "model.safetensors").unlink()


def altered_model(name: str, target: Path, **changes: Any) -> None:
    shutil.copytree(model_directory(name), target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(directory: Path, **flat: Any) -> Config:
    """Return a configuration whose ``model`` and ``dataset`` may be names in ``directory``."""
    flat = COMMON | flat
    for kind in ("model", "dataset"):
        if (directory / str(flat.get(kind))).is_dir():
            flat[kind] = str(directory / flat[kind])
    return Config.create("cpu", **{"storage": str(directory / "runs"), **flat})


def variant(directory: Path, case: str, variant: str, ranks: int, **changes: Any) -> Config:
    """Return a run that must equal the case's reference."""
    flat = {**CASES[case], **VALID[ranks][case][variant], **changes}
    return config(directory, **{"name": f"{case}.{variant}.{ranks}", "dp": ranks // flat.get("tp", 1), **flat})


def reference(directory: Path, case: str) -> Config:
    """Return the case in one process with plain torch."""
    return config(directory, name=f"{case}.reference", engine="torch", dp=1, **CASES[case])


SELF_DETECTED_FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "data.sampler_of_the_world": ("qwen2", "1x2-zero1", {"evaluate": False}),
    "tensor_parallel.seed_of_each_rank": ("bloom", "1x2-zero2", {"model": "bloom-dropout"}),
    "tensor_parallel.row_all_reduce_skipped": ("qwen2", "1x2-zero2", {"evaluate": False}),
    "tensor_parallel.projections_not_split": ("qwen2", "1x2-zero3", {}),
}
"""Deliberate faults that the run itself detects: case, variant and changes of each, on two ranks."""

STOP, END = 3, 8
INTERRUPTED: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2-optimizer": {"zero_stage": 2, "offload": "optimizer"},
    "zero3": {"zero_stage": 3},
    "zero3-all": {"zero_stage": 3, "offload": "all"},
    "zero0-bf16": {"zero_stage": 0, "precision": "bf16"},
    "zero3-bf16": {"zero_stage": 3, "precision": "bf16"},
    "fsdp-full": {"engine": "fsdp"},
    "packed": {"zero_stage": 2, "model": "bloom-dropout", "batching": "packed", "seq_length": 128, "micro_batch": 2},
    "1x2-zero0": {"zero_stage": 0, "model": "bloom-dropout", "dp": 1, "tp": 2},
    "1x2-zero2": {"zero_stage": 2, "model": "bloom-dropout", "dp": 1, "tp": 2},
}  # fmt: skip
"""Runs with dropout that stop in the middle of an epoch of five steps, and end in the middle of the next."""


INTERRUPTED_ON_4: dict[str, dict[str, Any]] = {
    "2x2-zero1": {"zero_stage": 1, "model": "bloom-dropout", "dp": 2, "tp": 2},
    "2x2-zero3": {"zero_stage": 3, "model": "bloom-dropout", "dp": 2, "tp": 2},
    "fsdp-tp2": {"engine": "fsdp", "tp": 2},
}
"""The same on four ranks, and resumed in the same launch."""

ASYNC_SAVED: dict[int, tuple[str, ...]] = {
    2: ("zero1", "zero3", "fsdp-full", "1x2-zero2"),
    4: ("2x2-zero1", "fsdp-tp2"),
}
"""Runs that save during training, stop, and resume in the same launch, by number of ranks."""

ONE_STEP_WITHOUT_UPDATE: dict[str, dict[str, Any]] = {
    "drawn-gpt2": {"model": "gpt2", "random_init": True},
    "drawn-qwen2": {"model": "qwen2", "random_init": True, "seed": 7},
    "read-bloom": {"model": "bloom"},
}
"""Runs on 2 x 2 ranks with one step that changes nothing: their final weights equal the initial ones."""


def one_step_without_update(directory: Path, name: str) -> Config:
    still = {"learning_rate": 0.0, "steps": 1, "engine": "fsdp", "dp": 2, "tp": 2}
    return config(directory, name=f"one_step_without_update.{name}", **still, **ONE_STEP_WITHOUT_UPDATE[name])


def uninterrupted(directory: Path, kind: str, **changes: Any) -> Config:
    """Return a run of a kind of ``INTERRUPTED``, without the interruption."""
    flat = {"model": "gpt2-dropout", "max_examples": 40, "steps": END, **(INTERRUPTED | INTERRUPTED_ON_4)[kind]}
    if flat.get("batching") == "packed":
        # As many documents as fill five steps of eight rows with several each.
        flat["max_examples"] = 90
    return config(directory, **{"name": f"uninterrupted.{kind}", "dp": 2, **flat, **changes})


def interrupted(directory: Path, kind: str, **changes: Any) -> Config:
    """Return the same run, stopped in the middle."""
    return uninterrupted(directory, kind, **{"name": f"interrupted.{kind}", "stop_after": STOP, **changes})


def async_saved(directory: Path, kind: str, *, no_snapshot: bool = False) -> ProbedRun:
    """Return a run whose background writes are late, resumed from a checkpoint that was written during training."""
    name = f"no_snapshot.{kind}" if no_snapshot else f"async_saved.{kind}"
    asked = interrupted(directory, kind, name=name, checkpoint_every=2, async_save=True)
    return ProbedRun(asked, Probe(late_writes=True, no_snapshot=no_snapshot))


RESHAPE_CASES = ("gpt2", "qwen2", "frozen", "odd")
"""Without dropout, because a different number of ranks draws different random numbers."""

SAVED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "torch": (1, "gpt2", {"engine": "torch"}),
    "zero0": (2, "gpt2", STAGES["zero0"]),
    "zero1": (2, "gpt2", STAGES["zero1"]),
    "zero2-optimizer": (2, "gpt2", OFFLOADED["zero2-optimizer"]),
    "zero3": (2, "gpt2", STAGES["zero3"]),
    "fsdp": (2, "gpt2", {"engine": "fsdp"}),
    "fsdp-tp2": (2, "gpt2", {"engine": "fsdp", "tp": 2}),
    "fsdp-qwen2": (2, "qwen2", {"engine": "fsdp"}),
    "1x2-zero1": (2, "qwen2", {"zero_stage": 1, "tp": 2}),
    "frozen-zero1": (2, "frozen", STAGES["zero1"]),
    "odd-zero3": (2, "odd", STAGES["zero3"]),
    "zero1-bf16": (2, "gpt2", BF16["zero1-bf16"]),
    "zero3-bf16": (2, "gpt2", BF16["zero3-bf16"]),
    "1x2-zero1-bf16": (2, "qwen2", {"zero_stage": 1, "tp": 2, "precision": "bf16"}),
    "dropout": (2, "gpt2", {"zero_stage": 1, "model": "gpt2-dropout"}),
    "2x2-zero3": (4, "qwen2", {"zero_stage": 3, "tp": 2}),
    "4x1-zero2": (4, "odd", STAGES["zero2"]),
}
"""Runs that stop at ``STOP``, in the middle of an epoch: number of ranks, case, and shape."""

RESHAPED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "4x1-of-2x2": (4, "2x2-zero3", {"zero_stage": 1, "stop_after": STOP + 1}),
    "hybrid-of-zero1": (4, "zero1", {"engine": "fsdp", "sharding": "hybrid_shard", "shard_size": 2}),
    "fsdp-of-torch": (2, "torch", {"engine": "fsdp"}),
    "zero2-optimizer-of-torch": (2, "torch", OFFLOADED["zero2-optimizer"]),
    "zero0-of-torch": (2, "torch", STAGES["zero0"]),
    "zero2-of-zero0": (2, "zero0", STAGES["zero2"]),
    "zero3-accumulated-of-zero1": (2, "zero1", ACCUMULATED["zero3-accumulated"]),
    "zero1-of-zero3": (2, "zero3", STAGES["zero1"]),
    "zero3-all-of-zero3": (2, "zero3", OFFLOADED["zero3-all"]),
    "zero2-of-zero2-optimizer": (2, "zero2-optimizer", STAGES["zero2"]),
    "persistent-of-zero2-optimizer": (2, "zero2-optimizer", {"zero_stage": 3, "persistence_threshold": 1000}),
    "fsdp-of-zero3": (2, "zero3", {"engine": "fsdp"}),
    "zero1-of-fsdp": (2, "fsdp", STAGES["zero1"]),
    "fsdp-tp2-of-fsdp": (2, "fsdp", {"engine": "fsdp", "tp": 2}),
    "fsdp-none-of-fsdp-tp2": (2, "fsdp-tp2", {"engine": "fsdp", "sharding": "no_shard"}),
    "fsdp-tp2-of-fsdp-qwen2": (2, "fsdp-qwen2", {"engine": "fsdp", "tp": 2}),
    "1x2-zero3-of-fsdp-qwen2": (2, "fsdp-qwen2", {"zero_stage": 3, "tp": 2}),
    "fsdp-of-1x2-zero1": (2, "1x2-zero1", {"engine": "fsdp"}),
    "fsdp-of-frozen-zero1": (2, "frozen-zero1", {"engine": "fsdp"}),
    "zero1-of-odd-zero3": (2, "odd-zero3", STAGES["zero1"]),
    "2x1-of-4x1": (2, "4x1-zero2", STAGES["zero3"]),
    "1-of-4x1-of-2x2": (1, "4x1-of-2x2", {"engine": "torch"}),
    "zero3-of-zero1": (1, "zero1", STAGES["zero3"]),
    "zero3-all-of-fsdp-tp2": (1, "fsdp-tp2", OFFLOADED["zero3-all"]),
    "zero3-of-frozen-zero1": (1, "frozen-zero1", STAGES["zero3"]),
    "zero0-of-odd-zero3": (1, "odd-zero3", STAGES["zero0"]),
}
"""Runs that continue a saved one: number of ranks, name of the saved run, and new shape."""

RESHAPED_WITHOUT_TRAINING: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero3-of-zero1-bf16": (2, "zero1-bf16", BF16["zero3-bf16"]),
    "zero0-of-zero3-bf16": (2, "zero3-bf16", BF16["zero0-bf16"]),
    "zero2-optimizer-of-zero3-bf16": (2, "zero3-bf16", OFFLOADED["zero2-optimizer"]),
    "fsdp-of-1x2-zero1-bf16": (2, "1x2-zero1-bf16", {"engine": "fsdp"}),
}
"""The same, but stopped at once: they save the loaded states in a different shape."""

RESHAPED_TWICE = ("dropout-once", "dropout-twice")

RESHAPE_FAULTS = {
    "restore.updates_not_counted": "zero1-of-zero3",
    "restore.columns_left_by_rank": "fsdp-none-of-fsdp-tp2",
    "restore.moments_exchanged": "fsdp-of-zero3",
}
"""Deliberate faults in a reshape, and the reshaped run of each. The run with a fault has the fault's name."""


def uninterrupted_torch(directory: Path, case: str) -> Config:
    """Return the run that reshaped runs must equal: in one process with plain torch, uninterrupted."""
    return _reshapable(directory, case, 1, {"engine": "torch"}, f"uninterrupted-torch.{case}")


def saved(directory: Path, name: str) -> Config:
    ranks, case, flat = SAVED[name]
    return _reshapable(directory, case, ranks, {**flat, "stop_after": STOP}, f"saved.{name}")


def reshaped(directory: Path, name: str) -> Config:
    ranks, source, flat = (RESHAPED | RESHAPED_WITHOUT_TRAINING)[name]
    if name in RESHAPED_WITHOUT_TRAINING:
        flat = {**flat, "precision": "bf16", "stop_after": STOP}
    return _reshapable(directory, case_of(source), ranks, flat, f"reshaped.{name}")


def case_of(name: str) -> str:
    return SAVED[name][1] if name in SAVED else case_of((RESHAPED | RESHAPED_WITHOUT_TRAINING)[name][1])


def ancestors(directory: Path, name: str) -> list[Config]:
    """Return the starts that a reshaped run continues from, the last one first."""
    _, source, _ = (RESHAPED | RESHAPED_WITHOUT_TRAINING)[name]
    if source in SAVED:
        return [saved(directory, source)]
    return [reshaped(directory, source), *ancestors(directory, source)]


def _reshapable(directory: Path, case: str, ranks: int, flat: dict[str, Any], name: str) -> Config:
    length = {"max_examples": 40, "steps": END, "evaluate": False}
    return config(directory, **{"dp": ranks // flat.get("tp", 1), **CASES[case], **length, **flat, "name": name})


def reshaped_runs(directory: Path, ranks: int) -> list[ProbedRun]:
    """Return the starts in a different shape on this many ranks, each in a copy of the run that it continues."""
    runs = []
    for name, (needed, *_) in (RESHAPED | RESHAPED_WITHOUT_TRAINING).items():
        if needed == ranks:
            (before, *_) = ancestors(directory, name)
            runs.append(ProbedRun(_copy(before, reshaped(directory, name))))
    for fault, name in RESHAPE_FAULTS.items():
        if RESHAPED[name][0] == ranks:
            (before, *_) = ancestors(directory, name)
            again = reshaped(directory, name).override(name=fault)
            runs.append(ProbedRun(_copy(before, again), Probe(fault=fault)))
    if ranks == 2:
        for name in RESHAPED_TWICE:
            shape = {"engine": "fsdp", "model": "gpt2-dropout"}
            again = _reshapable(directory, "gpt2", 2, shape, f"reshaped.{name}")
            runs.append(ProbedRun(_copy(saved(directory, "dropout"), again)))
    return runs


def _copy(before: Config, after: Config) -> Config:
    """Copy one run's directory to another run's, and return the other configuration."""
    shutil.copytree(before.directory, after.directory)
    return after


def shared_runs(directory: Path, ranks: int) -> list[ProbedRun]:
    """Return all runs on this many ranks that can share a launch."""
    runs = [
        ProbedRun(variant(directory, case, name, ranks)) for case, names in VARIANTS[ranks].items() for name in names
    ]
    if ranks == 1:
        runs += [ProbedRun(reference(directory, case)) for case in CASES]
        runs += [ProbedRun(uninterrupted_torch(directory, case)) for case in RESHAPE_CASES]
    if ranks == 2:
        for kind in INTERRUPTED:
            runs += [
                ProbedRun(uninterrupted(directory, kind), Probe(load_nothing=True)),
                ProbedRun(interrupted(directory, kind)),
            ]
        for name in SHARDED:
            again = variant(directory, "gpt2", name, 2, name=f"fsdp1.{name}", measure=False)
            runs.append(ProbedRun(again, Probe(engine="fsdp1")))
        for fault, (case, name) in MUTANTS.items():
            runs.append(ProbedRun(variant(directory, case, name, 2, name=fault), Probe(fault=fault)))
        for fault, (case, name, changes) in SELF_DETECTED_FAULTS.items():
            broken = variant(directory, case, name, 2, name=fault, **changes)
            runs.append(ProbedRun(broken, Probe(fault=fault, must_fail=True)))
        runs.append(async_saved(directory, "zero1", no_snapshot=True))
    runs += [async_saved(directory, kind) for kind in ASYNC_SAVED.get(ranks, ())]
    if ranks == 4:
        runs += [ProbedRun(one_step_without_update(directory, name)) for name in ONE_STEP_WITHOUT_UPDATE]
        for kind in INTERRUPTED_ON_4:
            runs += [
                ProbedRun(uninterrupted(directory, kind), Probe(load_nothing=True)),
                ProbedRun(interrupted(directory, kind, name=f"restarted.{kind}"), Probe(start_twice=True)),
            ]
    runs += [ProbedRun(saved(directory, name)) for name, (needed, *_) in SAVED.items() if needed == ranks]
    return runs


RESUME_FAULTS = {
    "restore.random_states_not_restored": "zero1",
    "restore.position_not_restored": "zero1",
    "restore.optimizer_not_restored": "zero1",
}
"""Deliberate faults in a resume, and the kind of run for each. The run with a fault has the fault's name."""

ALTERED = {"altered.position": "zero3", "altered.shard": "zero3", "altered.metadata": "fsdp-full"}
"""Runs with one bit flipped in a file of their checkpoint, and the kind of each."""

FATAL: dict[str, tuple[str, dict[str, Any]]] = {
    "killed.in_forward": ("zero3", {}),
    "killed.in_backward": ("zero1", {}),
    "killed.in_update": ("fsdp-full", {}),
    "killed.in_save": ("zero1", {}),
    "killed.in_publish": ("zero3", {}),
    "killed.in_prune": ("zero1", {"keep_last": 1}),
    "killed.in_report": ("zero1", {}),
    "storage.save_raises": ("zero1", {}),
    "killed.in_write": ("zero1", {"async_save": True}),
    "storage.limit_in_write": ("zero1", {"async_save": True}),
}
"""Faults that end the launch, each with its kind of run and settings."""

LONG: dict[str, Any] = {"steps": 48, "model": "gpt2-dropout-slow"}
"""Settings of a run that lasts long enough to be interrupted from outside at any step."""


def saving(directory: Path, kind: str, name: str, **changes: Any) -> Config:
    """Return a run with a checkpoint at every second step."""
    return uninterrupted(directory, kind, **{"name": name, "checkpoint_every": 2, **changes})


DIVERGING = {"learning_rate": 1e30, "checkpoint_every": 1}


def resumed_runs(directory: Path) -> list[ProbedRun]:
    """Return the second starts of the interrupted runs, and of altered copies of them."""
    second_start = {"stop_after": None}
    runs = [ProbedRun(interrupted(directory, kind, **second_start)) for kind in INTERRUPTED]
    for fault, kind in RESUME_FAULTS.items():
        again = _copy(interrupted(directory, kind), interrupted(directory, kind, name=fault, **second_start))
        runs.append(ProbedRun(again, Probe(fault=fault)))
    for name, kind in ALTERED.items():
        again = _copy(interrupted(directory, kind), interrupted(directory, kind, name=name, **second_start))
        runs.append(ProbedRun(again, Probe(must_fail=True)))
    position = checkpoint_of(directory / "runs" / "altered.position", STOP) / "rank-001.pt"
    metadata = checkpoint_of(directory / "runs" / "altered.metadata", STOP) / "engine" / ".metadata"
    for file in (shard(directory / "runs" / "altered.shard", STOP, rank=1), position, metadata):
        flip_a_bit(file)
    # Pretend that the start before was killed after its checkpoint, with two more rows and half a third written.
    metrics = directory / "runs" / "interrupted.zero1" / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])
    lost = "".join(json.dumps(last | {"step": STOP + more, "loss": 99.0}) + "\n" for more in (1, 2))
    metrics.write_text(metrics.read_text() + lost + '{"step": 6, "lo')
    diverging = uninterrupted(directory, "zero2-optimizer", name="diverging", **DIVERGING)
    runs.append(ProbedRun(diverging, Probe(must_fail=True)))
    return runs


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard(run: Path, step: int, rank: int) -> Path:
    """Return the file with a rank's share of the optimizer's states."""
    engine = checkpoint_of(run, step) / "engine" / "engine"
    return next(engine.glob(f"*zero_pp_rank_{rank}_*optim_states.pt"))


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"
