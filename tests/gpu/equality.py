"""Step 2: every engine's losses compared with a CPU's, a bit-for-bit resume, and a run that survives SIGTERM.

The CPU's losses in ``cpu_losses.json`` are those of plain torch in fp32 on the rows of :mod:`tests.gpu.data`. Write
them again with ``python tests/gpu/measure.py --write-cpu-losses`` whenever models, rows or these settings change.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.gpu.cases import Cases, Setting
from tests.gpu.data import write_rows
from tests.gpu.training import join_group
from tests.support.commands import train_command
from tutorial_lib import checkpoint, trainer
from tutorial_lib.checkpoint.directory import locate
from tutorial_lib.cli import DONE, STOPPED, plan_check
from tutorial_lib.config import Config
from tutorial_lib.records import RunDirectory
from tutorial_lib.theory.hardware import find_product

ROOT = Path(__file__).resolve().parents[2]
CPU_LOSSES = Path(__file__).with_name("cpu_losses.json")
MODELS = ("embedded/gpt2", "embedded/qwen2", "embedded/bloom")
STEPS = 5
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
"""Largest absolute difference of a step's loss, in nats per token."""

ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
    "fsdp": {"engine": "fsdp"},
}


def cases(setting: Setting) -> Cases:
    """Return the functions that do this module's measurements, by name."""
    models = setting.pick(full=MODELS, quick=MODELS[:1], tiny=MODELS[:1])
    engines = setting.pick(full=list(ENGINES), quick=list(ENGINES), tiny=["zero1", "fsdp"])
    found: Cases = {"SIGTERM": partial(stop_and_resume, setting)}  # comes first, because it takes longest
    for model in models:
        for engine in engines:
            found[f"{model} {engine} fp32"] = partial(compare, setting, model, engine, "fp32")
    for engine in setting.pick(full=engines, quick=engines, tiny=()):
        found[f"{MODELS[0]} {engine} bf16"] = partial(compare, setting, MODELS[0], engine, "bf16")
    for stage in (0, 1, 2, 3):  # only DeepSpeed scales the loss; fp16 is not run on a CPU
        if setting.device == "cuda":
            found[f"{MODELS[0]} zero{stage} fp16"] = partial(compare, setting, MODELS[0], f"zero{stage}", "fp16")
    for engine in setting.pick(full=("torch", "zero1", "zero3", "fsdp"), quick=("zero3",), tiny=("zero1",)):
        found[f"resume {engine}"] = partial(resume, setting, engine)
    for engine in setting.pick(full=engines, quick=("zero1",), tiny=("zero1",)):
        found[f"measured step {engine}"] = partial(compare_with_plan, setting, engine)
    return found


def configure(setting: Setting, name: str, model: str, **flat: Any) -> Config:
    """Return the configuration of a run on our rows, with eight sequences in four micro-batches per step."""
    return Config.create(
        "gpu",
        **{
            "device": setting.device, "launcher": "none", "storage": str(setting.path("runs")), "resume": "never",
            "name": name.replace("/", "-").replace(" ", "-"), "model": model, "precision": "fp32",
            **({"zero_stage": 1} if flat.get("engine", "deepspeed") == "deepspeed" else {}),
            "dataset": write_rows(setting.path("rows")), "seq_length": 128, "global_batch": 8, "micro_batch": 2,
            "steps": STEPS, "evaluate": False, "bucket_size": 1_000_000, "pin_memory": False, **flat,
        },
    )  # fmt: skip


def rows_of(config: Config) -> list[dict[str, Any]]:
    """Train a run in this process, and return its metrics."""
    trainer.train(config)
    return RunDirectory(config.directory).rows()


@contextmanager
def full_fp32() -> Iterator[None]:
    """Multiply matrices in full fp32, without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare(setting: Setting, model: str, engine: str, precision: str) -> dict[str, Any]:
    """Train a few steps, and return the losses next to the CPU's."""
    config = configure(setting, f"{model} {engine} {precision}", model, precision=precision, **ENGINES[engine])
    join_group(config)
    with full_fp32():
        rows = rows_of(config)
    expected = json.loads(CPU_LOSSES.read_text())["losses"][model]
    losses = [row["loss"] for row in rows]
    # fp16 skips updates until its loss scale has come down. Losses are comparable up to the first skipped update.
    comparable = next((n + 1 for n, row in enumerate(rows) if row["grad_norm"] is None), len(rows))
    differences = [abs(a - b) for a, b in zip(losses[:comparable], expected[:comparable], strict=True)]
    return {
        "losses": losses,
        "cpu_losses": expected,
        "compared_steps": comparable,
        "skipped_updates": sum(row["grad_norm"] is None for row in rows),
        "largest_difference": max(differences),
        "tolerance": TOLERANCE[precision],
        "equal": max(differences) <= TOLERANCE[precision],
        "step_seconds": min(row["seconds"] for row in rows),
    }


def resume(setting: Setting, engine: str) -> dict[str, Any]:
    """Return whether a run that was interrupted after three of six steps ends like an uninterrupted one, bit for bit.

    ``repeatable`` says whether two uninterrupted runs end alike. If not, kernels sum in a different order each time,
    and a resume cannot be judged. PyTorch is told to prefer deterministic kernels.
    """
    precision = "fp32" if setting.device == "cpu" else "bf16"
    flat = {"precision": precision, "steps": 6, "resume": "auto", **ENGINES[engine]}
    whole, again, halves = (
        configure(setting, f"resume {engine} {name}", "embedded/gpt2", **flat) for name in ("whole", "again", "halves")
    )
    join_group(whole)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected, repeated = rows_of(whole), rows_of(again)
        rows_of(halves.override(stop_after=3))
        resumed = rows_of(halves)
    finally:
        torch.use_deterministic_algorithms(False)
    return {
        "repeatable": _same(expected, repeated) and _same_states(whole, again),
        "resumed_from": RunDirectory(halves.directory).result()["resumed_from"],
        "same_losses": _same(expected, resumed),
        "same_weights_and_moments": _same_states(whole, halves),
        "losses": [row["loss"] for row in expected],
        "resumed_losses": [row["loss"] for row in resumed],
    }


def _same(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    compared = ("step", "epoch", "loss", "tokens", "grad_norm", "lr")
    return [[row[key] for key in compared] for row in rows] == [[row[key] for key in compared] for row in others]


def _same_states(one: Config, other: Config) -> bool:
    a, b = (checkpoint.open_full(locate(config.directory)) for config in (one, other))
    names = [name for name, _ in parameters_of(one)]
    return all(
        torch.equal(a.parameter(name), b.parameter(name))
        and all(torch.equal(a.moment(name, which), b.moment(name, which)) for which in checkpoint.MOMENTS)
        for name in names
    )


def parameters_of(config: Config) -> list[tuple[str, Any]]:
    """Return names and empty tensors of the model's parameters."""
    from tutorial_lib.models.meta import model_outline

    return list(model_outline(config.model, config.engine).named_parameters())


def compare_with_plan(setting: Setting, engine: str) -> dict[str, Any]:
    """Train with ``measure``, and return the rows of ``plan --check``: states, a step's peak, traffic and seconds."""
    config = configure(
        setting, f"measured {engine}", "embedded/gpt2-small" if setting.device == "cuda" else "embedded/gpt2",
        random_init=True, batching="max_length", precision="bf16", measure=True, **ENGINES[engine],
    )  # fmt: skip
    join_group(config)
    trainer.train(config)
    preset = find_product(torch.cuda.get_device_name()) if setting.device == "cuda" else None
    return {
        "preset": preset,
        "rows": json.loads(plan_check.describe_predictions(str(config.directory), gpu=preset, as_json=True)),
    }


def stop_and_resume(setting: Setting) -> dict[str, Any]:
    """Send SIGTERM to a run in a new process, start it again, and return both exit codes, steps and times."""
    steps = setting.pick(full=60, quick=60, tiny=20)
    config = configure(setting, "sigterm", "embedded/gpt2", steps=steps, resume="auto", engine="deepspeed")
    run = RunDirectory(config.directory)
    began = time.perf_counter()
    first = _start(setting, config)
    while len(run.rows()) < 3 and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    sent = time.perf_counter()
    first_code = first.wait(timeout=60)
    until_saved = time.perf_counter() - sent
    stopped_at = run.rows()[-1]["step"]
    second_code = _start(setting, config).wait(timeout=60)
    rows, result = run.rows(), run.result()
    return {
        "first_exit_code": first_code,
        "stopped_at_step": stopped_at,
        "signal_to_exit_seconds": until_saved,
        "second_exit_code": second_code,
        "resumed_from": result["resumed_from"],
        "steps_without_gap_or_repeat": [row["step"] for row in rows] == list(range(1, steps + 1)),
        "as_promised": (first_code, second_code, result["resumed_from"]) == (STOPPED, DONE, stopped_at),
        "both_starts_seconds": time.perf_counter() - began,
    }


def _start(setting: Setting, config: Config) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *train_command(config)], cwd=ROOT, env=dict(os.environ), stdout=sys.stderr
    )


def write_cpu_losses(setting: Setting) -> Path:
    """Train the reference on this machine's CPU, and replace the committed losses."""
    losses = {}
    for model in MODELS:
        config = configure(setting, f"reference {model}", model, engine="torch", device="cpu")
        losses[model] = [row["loss"] for row in rows_of(config)]
    import transformers

    content = {
        "what": "loss in nats per token of each step: plain torch, fp32, one CPU process",
        "written_by": "python tests/gpu/measure.py --write-cpu-losses",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "losses": losses,
    }
    CPU_LOSSES.write_text(json.dumps(content, indent=1) + "\n")
    return CPU_LOSSES
