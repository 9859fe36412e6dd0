"""Benchmarks behind ``docs/benchmarks.md``, run by ``make bench`` or ``python -m tests.benchmarks.bench [NAMES]``.

Competitors run alternately on the same machine, and the figure is their ratio. Each benchmark's newest result
is saved in ``results.json`` beside this file, with the date and the machine. These are not tests, so a slow machine
does not make anything fail. A target that was missed is marked in the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tutorial_lib.config import ConfigError

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
_PACKAGES = ("torch", "deepspeed", "ray", "transformers", "datasets")

Rows = list[tuple[str, str, str, bool | None]]
"""Name of the measurement, its figure, its target, and whether the target was met."""


def _padding(result: dict[str, Any]) -> Rows:
    rate, shape = result["tokens_per_second"], f"length {result['seq_length']}, batch {result['batch']}"
    return [
        (
            f"useful tokens/s, {name} against max_length ({shape})",
            f"{_range(result[name])} = {rate[name]:.0f} / {rate['max_length']:.0f}",
            target,
            met,
        )
        for name, target, met in (
            ("longest", "at least 5", result["longest"]["median"] >= 5),
            ("packed", "", None),
        )
    ]


def _loop(result: dict[str, Any]) -> Rows:
    shape = f"{result['ranks']} ranks, {result['global_batch']} x {result['seq_length']} tokens"
    return [
        (
            f"time per step, our loop against the shortest DeepSpeed loop, {stage} ({shape})",
            f"{_range(result[stage])}; by processor time {result[stage]['median_processor_time']:.3f}",
            "at most 1.02",
            result[stage]["median"] <= 1.02,
        )
        for stage in ("zero1", "zero3")
    ]


def _engines(result: dict[str, Any]) -> Rows:
    shape = f"{result['ranks']} ranks, {result['global_batch']} x {result['seq_length']} tokens, {result['model']}"
    ratios = {name: ratio for name, ratio in result.items() if isinstance(ratio, dict) and "median" in ratio}
    alone = ratios["one process"]["median"]
    return [
        (
            f"tokens/s, {name} against DDP ({shape})",
            f"{_range(ratio)}; against one process {ratio['median'] / alone:.3g}; a step's collectives: "
            + (", ".join(f"{count} {kind}" for kind, count in ratio["collectives"].items()) or "none"),
            "",
            None,
        )
        for name, ratio in ratios.items()
    ]


def _checkpoints(result: dict[str, Any]) -> Rows:
    rows: Rows = []
    for name, one in result.items():
        if not isinstance(one, dict) or "over_formula" not in one:
            continue
        size = f"{name}, {one['num_parameters'] / 1e6:.0f} M parameters, {result['ranks']} ranks"
        over, stall = one["over_formula"], one["stall"]
        rows.append(
            (
                f"checkpoint, bytes against the states' ({size})",
                f"{over:.4f} = {one['bytes'] / 1e6:.0f} MB",
                "within 2 %",
                abs(over - 1) <= 0.02,
            )
        )
        save, on_disk, handed_over = one["save"], one["save_on_disk"], one["save_handed_over"]
        load = one["load"]
        restored = load["megabytes_per_second"] / on_disk["plain_megabytes_per_second"]
        rows += [
            (
                "  save, hashed, on the disk at its end: MB/s against torch.save, fsync and rename",
                f"{_range(on_disk)}: {save['megabytes_per_second']:.0f} / {on_disk['plain_megabytes_per_second']:.0f}",
                "at least 0.8",
                on_disk["median"] >= 0.8,
            ),
            (
                "  async_save, in memory when training goes on: MB/s against torch.save, in memory at its end",
                f"{_range(handed_over)}: {handed_over['megabytes_per_second']:.0f} / "
                f"{handed_over['plain_megabytes_per_second']:.0f}",
                "at least 0.8",
                handed_over["median"] >= 0.8,
            ),
            (
                "  for contrast: the save that is on the disk against the torch.save that is not",
                f"{_range(save)}: {save['megabytes_per_second']:.0f} / {save['plain_megabytes_per_second']:.0f}",
                "",
                None,
            ),
            (
                "  restore, verified and filled in: MB/s against torch.save, fsync and rename",
                f"{restored:.3g}: {load['megabytes_per_second']:.0f} / {on_disk['plain_megabytes_per_second']:.0f}"
                f"; against torch.load, which fills nothing, {_range(load)}",
                "at least 0.8",
                restored >= 0.8,
            ),
        ]
        waits = {kind: stall[kind]["stall_seconds"] for kind in ("at once", "async_save")}
        rows.append(
            (
                "  a saving step waits, with async_save against without",
                f"{waits['async_save']:.2f} s / {waits['at once']:.2f} s; lost until the files are there "
                f"{stall['async_save']['seconds_lost']:.2f} s in {stall['steps_meanwhile']:.0f} steps",
                "",
                None,
            )
        )
    return rows


def _startup(result: dict[str, Any]) -> Rows:
    warm, cold = result["seconds"]["warm"], result["seconds"]["cold"]
    rows: Rows = []
    for what, name, target in (
        ("first", "first launch in a program", 1.0),
        ("second", "later launch in the same program", 5.0),
        ("shell", "python -m tutorial_lib train", 1.0),
    ):
        ratio = result["times_faster"][what]
        rows.append(
            (
                f"{name}, 4 steps on 2 ranks: new interpreters against the warm server",
                f"{_range(ratio)}: {cold[what]:.1f} s / {warm[what]:.1f} s",
                f"at least {target:g}",
                ratio["median"] >= target,
            )
        )
    beyond = warm["beyond the run"]
    return [*rows, ("  of a later launch, beyond the run itself", f"{beyond:.2f} s", "at most 0.7 s", beyond <= 0.7)]


def _ray(result: dict[str, Any]) -> Rows:
    first, again = result["seconds_to_first_step"], result["second"]["seconds_to_first_step"]
    parts: Rows = [
        (f"  {part}", f"{seconds:.1f} s; second fit {result['second']['parts'][part]:.1f} s", "", None)
        for part, seconds in result["parts"].items()
    ]
    return [
        ("Ray Train with 2 workers, until its first step", f"{first:.1f} s", "at most 23 s", first <= 23),
        (
            "  a second fit, with Ray running",
            f"{again:.1f} s",
            "at most half of the first",
            again <= first / 2,
        ),
        *parts,
        ("  Ray's end", f"{result['seconds_to_stop']:.1f} s", "", None),
    ]


def _notebook(result: dict[str, Any]) -> Rows:
    targets = {"01_zero_finetuning": 180, "02_tensor_data_parallel": 240, "03_fsdp": 240, "04_checkpoints": 300}
    return [
        (
            f"notebook {name}, warm",
            f"{one['seconds']:.0f} s",
            f"at most {targets[name]} s",
            one["seconds"] <= targets[name],
        )
        for name, one in result["lessons"].items()
    ]


_SHOWN: dict[str, tuple[str, Callable[[dict[str, Any]], Rows]]] = {
    "padding": ("tests.benchmarks.padding", _padding),
    "loop": ("tests.benchmarks.loop", _loop),
    "engines": ("tests.benchmarks.engines", _engines),
    "checkpoints": ("tests.benchmarks.checkpoints", _checkpoints),
    "startup": ("tests.benchmarks.startup", _startup),
    "ray": ("tests.benchmarks.ray_startup", _ray),
    "notebook": ("tests.benchmarks.notebook", _notebook),
}
NAMES = tuple(_SHOWN)


def main(names: Sequence[str] = (), as_json: bool = False) -> int:
    """Run the named benchmarks (all by default), print their figures, save them in ``results.json``, and return 0.

    Raises:
        ConfigError: there is no benchmark of that name.
        RuntimeError: one of them failed; its own error is on the terminal.
    """
    if unknown := [name for name in names if name not in _SHOWN]:
        raise ConfigError(f"There is no benchmark {unknown[0]!r}. Write one of: {', '.join(NAMES)}.")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measured = {}
    for name in names or NAMES:
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        before = os.getloadavg()[0]
        outcome = _in_new_process(_SHOWN[name][0])
        measured[name] = results[name] = {**outcome, "measured": _circumstances(before)}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(measured, indent=2) if as_json else table(measured))
    return 0


def _in_new_process(module: str) -> dict[str, Any]:
    """Return the result of the module's ``measure``, from a new process that no earlier benchmark has warmed up."""
    with tempfile.TemporaryDirectory(prefix="tutorial-lib-bench-") as scratch:
        outcome = Path(scratch) / "outcome.json"
        write = f"pathlib.Path({str(outcome)!r}).write_text(json.dumps(measure()))"
        code = f"import json, pathlib; from {module} import measure; {write}"
        # Standard output is for the figures.
        if subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=sys.stderr).returncode:
            raise RuntimeError(f"Benchmark {module.rpartition('.')[2]!r} failed.")
        return dict(json.loads(outcome.read_text()))


def table(results: dict[str, Any]) -> str:
    """Format the results of :func:`main` as lines with a figure, its target, and whether the target was met."""
    lines = []
    for name, result in results.items():
        where = result["measured"]
        lines.append(
            f"{name}: {where['date']}, {where['cores']} cores, load before {where['load_before']:.1f}, "
            f"after {where['load_after']:.1f}"
        )
        for what, figure, target, met in _SHOWN[name][1](result):
            verdict = "" if met is None else f"  [{target}: {'met' if met else 'MISSED'}]"
            lines.append(f"  {what}: {figure}{verdict}")
    return "\n".join(lines)


def _range(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3g} ({ratio['lowest']:.3g} to {ratio['highest']:.3g})"


def _circumstances(load_before: float) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    given = argparse.ArgumentParser(description="Measure the figures of docs/benchmarks.md.")
    given.add_argument("names", nargs="*", help=f"benchmarks to run, all by default: {', '.join(NAMES)}")
    given.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = given.parse_args()
    try:
        sys.exit(main(options.names, as_json=options.json))
    except (ConfigError, RuntimeError) as error:
        sys.exit(f"error: {error}")
