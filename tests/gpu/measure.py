"""Measurement of the course on a GPU: ``python tests/gpu/measure.py --out DIR [--quick]``.

It runs from a plain checkout with any Python that has torch, needs neither Ray nor a network, and ends after at most
9.5 minutes (``--quick``: 3). Each step runs in a process of its own with a time limit, so a failure or a hang does not
stop the others. ``DIR`` gets 8 files: one JSON file per step, which is rewritten after every case, and an archive with
the log and the traces. Names of quantities contain their unit.

One call has no time for all steps. Make three, each with time for its steps' limits: ``--steps 1 2 4``,
``--steps 3 5`` and ``--steps 6 7``. The figures of one H200 are in docs/measured/h200. The most important cases that
have none there should take about 8 minutes in one call:
``--steps 1 2 3 6 7 --cases "operators|SIGTERM|offload all|^fsdp$|^baseline$|[23]ZO-"``.

For a GPU machine without a network, collect the missing packages first with ``python tests/gpu/pack.py``, and copy
``build/gpu-wheels`` along with the checkout.

To rehearse every step on a CPU with tiny models: ``python tests/gpu/measure.py --out DIR --device cpu --tiny``.
To replace the CPU losses that the GPU must match: ``python tests/gpu/measure.py --write-cpu-losses``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # instead of this script's directory, which lacks `tests` and `tutorial_lib`

from tests.gpu import packages  # noqa: E402
from tests.gpu.processes import MemorySampler, Record, Step, remove_locks, run_step  # noqa: E402
from tutorial_lib.doctor.machine import STALE_LOCK_SECONDS, prebuilt_operators  # noqa: E402

STEPS = (
    Step("1-environment", "tests.gpu.environment", limit=130, case_limit=90),
    Step("2-equality", "tests.gpu.equality", limit=280, case_limit=110),
    Step("3-workshop", "tests.gpu.workshop", limit=370, case_limit=60, offloads=True),
    Step("4-activation-memory", "tests.gpu.activation_memory", limit=100, case_limit=60),
    Step("5-traces", "tests.gpu.traces", limit=80, case_limit=25),
    Step("6-async-checkpoint", "tests.gpu.async_checkpoint", limit=150, case_limit=145),
    Step("7-workshop-table", "tests.gpu.workshop_table", limit=260, case_limit=100, offloads=True),
)
OPERATORS = Step("0-operators", "tests.gpu.environment", limit=120, case_limit=90)
"""Step that compiles DeepSpeed's CPU Adam before all others, if a step offloads and needs it. It leaves no file."""

MINUTES = {"full": 9.5, "quick": 3.0, "tiny": 8.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, and return 0 if all of them completed."""
    options = _parser().parse_args(arguments)
    scratch = Path(tempfile.mkdtemp(prefix="tutorial-lib-gpu-"))
    try:
        if options.write_cpu_losses:
            return _write_cpu_losses(scratch)
        if options.out is None:
            _parser().error("write --out DIR")
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "traces.zip").unlink(missing_ok=True)
        records = measure(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0 if all(record.status == "done" for record in records) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the course on one GPU.")
    parser.add_argument("--out", type=Path, help="directory for results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="fewer cases and steps")
    sizes.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="tiny models, to rehearse")
    parser.add_argument("--steps", nargs="+", metavar="NUMBER", help="only the steps with these numbers")
    parser.add_argument(
        "--cases", default="", metavar="PATTERN", help="only the cases that match (a regular expression)"
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu-wheels", help="wheels from pack.py")
    parser.add_argument("--write-cpu-losses", action="store_true", help="replace tests/gpu/cpu_losses.json, and end")
    parser.set_defaults(size="full")
    return parser


def measure(options: argparse.Namespace, scratch: Path) -> list[Record]:
    """Run the chosen steps one after the other."""
    began = time.time()
    until = began + 60 * MINUTES[options.size]
    say = _log_to(options.out / "measure.log", began)
    origins = packages.unpack_missing(options.wheels, scratch / "site")
    (scratch / "origins.json").write_text(json.dumps(origins))
    say(f"packages: {origins}")
    sys.path.append(str(scratch / "site"))
    setting = {
        "device": options.device, "size": options.size, "scratch": str(scratch), "out": str(options.out.resolve()),
        "only": options.cases,
    }  # fmt: skip
    sampler = MemorySampler()
    if options.device == "cuda":
        sampler.start()
        say(f"GPU memory is sampled by {sampler.source}; used before: {sampler.peak(began, time.time())} bytes")
    variables = environment(scratch)
    remove_locks(variables["TORCH_EXTENSIONS_DIR"], until=began - STALE_LOCK_SECONDS)
    steps = [step for step in STEPS if options.steps is None or step.name.startswith(tuple(options.steps))]

    def run(step: Step, out: Path, **changes: str) -> Record:
        return run_step(scale_limits(options.device, step), setting | changes, out, variables, sampler, say, until)

    try:
        if needs_compiler(steps, options.cases, variables):
            run(OPERATORS, scratch, only="operators")
        records = [run(step, options.out) for step in steps]
        say(f"all: {', '.join(f'{record.step.name} {record.status}' for record in records)}")
    finally:
        sampler.stop()
        with zipfile.ZipFile(options.out / "traces.zip", "a") as archive:
            archive.write(options.out / "measure.log", "measure.log")
        (options.out / "measure.log").unlink()
    for record in records:
        for case in record.cases:
            print(f"{record.step.name:22} {case['case']:52} {case['status']:10} {case.get('seconds', '')}")
    return records


def needs_compiler(steps: Sequence[Step], cases: str, variables: dict[str, str]) -> bool:
    """Return whether a step that offloads would have to compile CPU Adam, for which one of its cases has no time."""
    if prebuilt_operators().get("cpu_adam") or any(Path(variables["TORCH_EXTENSIONS_DIR"]).glob("**/cpu_adam.so")):
        return False
    compiles_itself = STEPS[0] in steps and re.search(cases, "DeepSpeed's operators")
    return not compiles_itself and any(step.offloads for step in steps)


def scale_limits(device: str, step: Step) -> Step:
    """Return the step, with four times its limits on a CPU, which may be slow."""
    factor = 1 if device == "cuda" else 4
    return dataclasses.replace(step, limit=factor * step.limit, case_limit=factor * step.case_limit)


def environment(scratch: Path) -> dict[str, str]:
    """Return the steps' environment: our packages first, no network, caches in the scratch directory.

    Only compiled operators stay, so that the next call finds them.
    """
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(scratch / "site"), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "TUTORIAL_LIB_CACHE": str(scratch / "cache"),
        "HF_HOME": str(scratch / "huggingface"),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / "build" / "torch-extensions")),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LOCAL_RANK": "0",  # DeepSpeed needs it even for one process
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the resume needs matrix products that repeat bit for bit
    }


def end_once(*_: object) -> None:
    """End after SIGTERM without leaving processes or the scratch directory, even if the signal comes again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _log_to(path: Path, began: float) -> Callable[[str], None]:
    path.write_text("")

    def say(text: str) -> None:
        line = f"[{time.time() - began:7.1f} s] {text}"
        with path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        if not text.startswith("---"):  # the output of processes goes only into the file
            print(line, flush=True)

    return say


def _write_cpu_losses(scratch: Path) -> int:
    os.environ.update(environment(scratch))
    from tests.gpu.cases import Setting
    from tests.gpu.equality import write_cpu_losses

    setting: dict[str, Any] = {"device": "cpu", "size": "full", "scratch": str(scratch), "out": str(scratch)}
    print(write_cpu_losses(Setting(**setting)).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_once)
    sys.exit(main())
