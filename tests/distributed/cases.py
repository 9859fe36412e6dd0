"""Runs to compare: a case is a training problem, a variant is a way to solve it that must not change the result.

``make matrix`` runs every valid combination of the two, ``make test`` those that :mod:`tests.distributed.covering`
chooses: every pair of settings that some combination has still meets.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.covering import cover
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
    # with the default of 1e-8 makes updates of full length out of noise. This keeps updates continuous.
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
    told = {
        key for variants in VALID.values() for flats in variants.values() for flat in flats.values() for key in flat
    }
    flat = VALID[ranks][case][name]
    return {"ranks": ranks, "case": case} | {key: flat.get(key) for key in told - {"dp", "measure"}}


def run_name(combination: Combination) -> str:
    ranks, case, name = combination
    return f"{case}.{name}.{ranks}"


NEEDED = {
    # Asked for by name in tests of one thing. Those of BROKEN_RUNS are needed too.
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

BROKEN_RUNS = {
    "same_data_on_each_rank": ("gpt2", "zero1"),
    "sharded_over_a_larger_grid": ("gpt2", "zero2"),
    "padding_in_the_loss": ("gpt2", "zero3"),
    "clipping_dropped": ("gpt2", "zero2"),
    "clipping_left_to_the_default": ("gpt2", "zero0"),
    "mean_of_means": ("uneven", "zero2"),
    "loss_of_own_tokens": ("uneven", "zero1"),
    "gradients_summed": ("untied", "zero1"),
    "gradients_averaged_twice": ("gpt2", "zero3"),
    "trial_step_kept": ("gpt2", "zero0-bf16"),
    "column_all_reduce_skipped": ("qwen2", "1x2-zero1"),
    "columns_not_moved": ("gpt2", "fsdp-tp2"),
    "whole_gradients_counted_twice": ("gpt2", "fsdp-tp2"),
    "slopes_of_the_first_heads": ("bloom", "fsdp-tp2"),
}
"""Case and variant for each fault of ``worker.BROKEN``, on two ranks."""


def combinations() -> list[Combination]:
    """Return the combinations to run: all valid ones, or enough to cover every pair of settings."""
    if MATRIX:
        return VALID_COMBINATIONS
    sound = {run_name((2, *origin)) for origin in BROKEN_RUNS.values()} | {"gpt2.zero1-bf16.2"}
    needed = [each for each in VALID_COMBINATIONS if run_name(each) in NEEDED | sound]
    assert len(needed) == len(NEEDED | sound), "each name is that of a valid combination"
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


REFUSED_RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sampler_of_the_world": ("qwen2", "1x2-zero1", {"evaluate": False}),
    "seed_of_each_rank": ("bloom", "1x2-zero2", {"model": "bloom-dropout"}),
    "row_all_reduce_skipped": ("qwen2", "1x2-zero2", {"evaluate": False}),
    "projection_left_whole": ("qwen2", "1x2-zero3", {}),
}
"""The same for faults that a run detects itself."""

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

LATE: dict[int, tuple[str, ...]] = {
    2: ("zero1", "zero3", "fsdp-full", "1x2-zero2", "zero1-without_snapshot"),
    4: ("2x2-zero1", "fsdp-tp2"),
}
"""Runs that save during training, stop, and resume in the same launch, by number of ranks."""

UNTOUCHED: dict[str, dict[str, Any]] = {
    "drawn-gpt2": {"model": "gpt2", "random_init": True},
    "drawn-qwen2": {"model": "qwen2", "random_init": True, "seed": 7},
    "read-bloom": {"model": "bloom"},
}
"""Runs on 2 x 2 ranks with one step that changes nothing: their final weights equal the initial ones."""


def untouched(directory: Path, name: str) -> Config:
    still = {"learning_rate": 0.0, "steps": 1, "engine": "fsdp", "dp": 2, "tp": 2}
    return config(directory, name=f"untouched.{name}", **still, **UNTOUCHED[name])


def interruptible(directory: Path, kind: str, part: str, **changes: Any) -> Config:
    """Return the ``whole`` run, or the one ``halved`` by a stop."""
    flat = {"model": "gpt2-dropout", "max_examples": 40, "steps": END, **(INTERRUPTED | INTERRUPTED_ON_4)[kind]}
    stop = {"stop_after": STOP} if part == "halved" else {}
    if flat.get("batching") == "packed":
        # As many documents as fill five steps of eight rows with several each.
        flat["max_examples"] = 90
    return config(directory, **{"name": f"{part}.{kind}", "dp": 2, **flat, **stop, **changes})


def late(directory: Path, kind: str) -> Config:
    asynchronous = {"checkpoint_every": 2, "async_save": True}
    return interruptible(directory, kind.partition("-without")[0], "halved", name=f"late.{kind}", **asynchronous)


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

STILL: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero3-of-zero1-bf16": (2, "zero1-bf16", BF16["zero3-bf16"]),
    "zero0-of-zero3-bf16": (2, "zero3-bf16", BF16["zero0-bf16"]),
    "zero2-optimizer-of-zero3-bf16": (2, "zero3-bf16", OFFLOADED["zero2-optimizer"]),
    "fsdp-of-1x2-zero1-bf16": (2, "1x2-zero1-bf16", {"engine": "fsdp"}),
}
"""The same, but stopped at once: they save the loaded states in a different shape."""

SEEDED_ANEW = ("dropout-once", "dropout-twice")

RESHAPED_BADLY = {
    "broken-updates_not_counted": "zero1-of-zero3",
    "broken-columns_left_by_rank": "fsdp-none-of-fsdp-tp2",
    "broken-moments_exchanged": "fsdp-of-zero3",
}


def unbroken(directory: Path, case: str) -> Config:
    """Return the run that reshaped runs must equal: in one process with plain torch, never stopped."""
    return _reshapable(directory, case, 1, {"engine": "torch"}, f"unbroken.{case}")


def saved(directory: Path, name: str) -> Config:
    ranks, case, flat = SAVED[name]
    return _reshapable(directory, case, ranks, {**flat, "stop_after": STOP}, f"saved.{name}")


def reshaped(directory: Path, name: str) -> Config:
    ranks, source, flat = (RESHAPED | STILL)[RESHAPED_BADLY.get(name, name)]
    if name in STILL:
        flat = {**flat, "precision": "bf16", "stop_after": STOP}
    return _reshapable(directory, case_of(source), ranks, flat, name if name in RESHAPED_BADLY else f"reshaped.{name}")


def case_of(name: str) -> str:
    return SAVED[name][1] if name in SAVED else case_of((RESHAPED | STILL)[name][1])


def ancestors(directory: Path, name: str) -> list[Config]:
    """Return the starts that a reshaped run continues from, the last one first."""
    _, source, _ = (RESHAPED | STILL)[name]
    if source in SAVED:
        return [saved(directory, source)]
    return [reshaped(directory, source), *ancestors(directory, source)]


def _reshapable(directory: Path, case: str, ranks: int, flat: dict[str, Any], name: str) -> Config:
    length = {"max_examples": 40, "steps": END, "evaluate": False}
    return config(directory, **{"dp": ranks // flat.get("tp", 1), **CASES[case], **length, **flat, "name": name})


def reshaped_runs(directory: Path, ranks: int) -> list[Config]:
    """Return the starts in a different shape on this many ranks, each in a copy of the run that it continues."""
    table = RESHAPED | STILL | {name: RESHAPED[origin] for name, origin in RESHAPED_BADLY.items()}
    runs = []
    for name, (needed, source, _) in table.items():
        if needed == ranks:
            runs.append(reshaped(directory, name))
            origin = saved(directory, source) if source in SAVED else reshaped(directory, source)
            shutil.copytree(origin.directory, runs[-1].directory)
    if ranks == 2:
        for name in SEEDED_ANEW:
            shape = {"engine": "fsdp", "model": "gpt2-dropout"}
            runs.append(_reshapable(directory, "gpt2", 2, shape, f"reshaped.{name}"))
            shutil.copytree(saved(directory, "dropout").directory, runs[-1].directory)
    return runs


def shared_runs(directory: Path, ranks: int) -> list[Config]:
    """Return all runs on this many ranks that can share a launch."""
    runs = [variant(directory, case, name, ranks) for case, names in VARIANTS[ranks].items() for name in names]
    if ranks == 1:
        runs += [reference(directory, case) for case in CASES]
        runs += [unbroken(directory, case) for case in RESHAPE_CASES]
    if ranks == 2:
        runs += [interruptible(directory, kind, "whole") for kind in INTERRUPTED]
        runs += [interruptible(directory, kind, "halved") for kind in INTERRUPTED]
        runs += [variant(directory, "gpt2", name, 2, name=f"fsdp1-{name}", measure=False) for name in SHARDED]
        runs += [variant(directory, *where, 2, name=f"broken-{fault}") for fault, where in BROKEN_RUNS.items()]
        runs += [
            variant(directory, case, name, 2, name=f"refused-{fault}", **changes)
            for fault, (case, name, changes) in REFUSED_RUNS.items()
        ]
    runs += [late(directory, kind) for kind in LATE.get(ranks, ())]
    if ranks == 4:
        runs += [untouched(directory, name) for name in UNTOUCHED]
        for kind in INTERRUPTED_ON_4:
            runs += [
                interruptible(directory, kind, "whole"),
                interruptible(directory, kind, "halved", name=f"twice.{kind}"),
            ]
    runs += [saved(directory, name) for name, (needed, *_) in SAVED.items() if needed == ranks]
    return runs


CONTINUED_BADLY = {
    "broken-random_states_not_restored": "zero1",
    "broken-position_not_restored": "zero1",
    "broken-optimizer_not_restored": "zero1",
}
REFUSED = {
    "refused-flipped-position": "zero3",
    "refused-flipped": "zero3",
    "refused-flipped-metadata": "fsdp-full",
}


FATAL = {
    "killed_in_forward": "zero3",
    "killed_in_backward": "zero1",
    "killed_in_update": "fsdp-full",
    "killed_in_save": "zero1",
    "killed_in_publish": "zero3",
    "killed_in_prune": "zero1",
    "killed_in_report": "zero1",
    "save_raises": "zero1",
    "killed_in_write": "zero1",
    "limit_in_write": "zero1",
}
"""Faults that take their launch down with them, with the kind of run for each."""

IN_BACKGROUND = ("killed_in_write", "limit_in_write")
"""Faults that happen while a thread writes files and training continues."""


def fault(directory: Path, kind: str, name: str, **changes: Any) -> Config:
    """Return a run with a checkpoint at every second step, whose name ends with the name of a fault."""
    strikes = name.partition("-")[2]
    given = {
        "name": name,
        "checkpoint_every": 2,
        "async_save": strikes in IN_BACKGROUND,
        "keep_last": 1 if strikes == "killed_in_prune" else None,
        # What comes from outside has to find it still running.
        **({"model": "gpt2-dropout-slow"} if changes.get("steps", END) > END else {}),
        **changes,
    }
    return interruptible(directory, kind, "whole", **given)


DIVERGING = {"learning_rate": 1e30, "checkpoint_every": 1}


def resumed_runs(directory: Path) -> list[Config]:
    """Return the second starts of the halved runs, and of altered copies of them."""
    runs = [interruptible(directory, kind, "halved", stop_after=None) for kind in INTERRUPTED]
    for name, origin in (CONTINUED_BADLY | REFUSED).items():
        runs.append(interruptible(directory, origin, "halved", name=name, stop_after=None))
        shutil.copytree(directory / "runs" / f"halved.{origin}", runs[-1].directory)
    # The start before did not stop at its checkpoint: it had written two more rows and half a third when it was killed.
    metrics = directory / "runs" / "halved.zero1" / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])
    lost = "".join(json.dumps(last | {"step": STOP + more, "loss": 99.0}) + "\n" for more in (1, 2))
    metrics.write_text(metrics.read_text() + lost + '{"step": 6, "lo')
    runs.append(interruptible(directory, "zero2-optimizer", "whole", name="refused-diverging", **DIVERGING))
    position = checkpoint_of(directory / "runs" / "refused-flipped-position", STOP) / "rank-001.pt"
    metadata = checkpoint_of(directory / "runs" / "refused-flipped-metadata", STOP) / "engine" / ".metadata"
    for saved in (shard(directory / "runs" / "refused-flipped", STOP, rank=1), position, metadata):
        content = bytearray(saved.read_bytes())
        content[len(content) // 2] ^= 1
        saved.write_bytes(content)
    return runs


def shard(run: Path, step: int, rank: int) -> Path:
    """Return the file with a rank's share of the optimizer's states."""
    engine = checkpoint_of(run, step) / "engine" / "engine"
    return next(engine.glob(f"*zero_pp_rank_{rank}_*optim_states.pt"))


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"
