"""Runner of the course's notebooks without a browser, for `make run-notebooks`, `execute`, `nbval` and the tests.

Every notebook runs on the profile it was committed with (the CPU's), in a working directory of its own that starts
empty. Its parameter ``STORAGE`` points there, so it never finds anything that an earlier run left behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
RESULTS = ROOT / "build" / "notebooks"
CELL_TIMEOUT = 600
"""Seconds a single cell may take."""
KERNEL_NAME = "Python 3 (tutorial_lib)"
"""The kernel's display name, as `.ci/setup` installs it."""
QUIET_KERNEL = ["--IPKernelApp.log_level=ERROR"]
"""Options that silence a kernel's warning about unencrypted TCP, because the kernel listens only on the loopback."""


@dataclass(frozen=True)
class Execution:
    """Outcome of one notebook.

    Attributes:
        notebook: its name, without the extension.
        output: the executed copy.
        seconds: wall time, including the kernel's start.
        cells: code cells in the notebook.
        error: what the failing cell raised, with its traceback; ``None`` if every cell ran.
    """

    notebook: str
    output: Path
    seconds: float
    cells: int
    error: str | None


def committed_notebooks() -> list[Path]:
    """Return the lessons in reading order, then the labs. No two have the same name."""
    return [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(NOTEBOOKS.glob("labs/*.ipynb"))]


def execute(notebook: Path, *, progress_bar: bool = False) -> Execution:
    """Run a notebook with papermill, and keep the executed copy under build/notebooks."""
    logging.getLogger("papermill").setLevel(logging.WARNING)
    import papermill

    output = RESULTS / notebook.name
    scratch = _fresh(RESULTS / "work" / notebook.stem)
    error = None
    started = time.perf_counter()
    try:
        papermill.execute_notebook(
            notebook,
            output,
            parameters={"STORAGE": str(scratch / "runs")},
            kernel_name="python3",
            language="python",
            cwd=scratch,
            progress_bar=progress_bar,
            execution_timeout=CELL_TIMEOUT,
            extra_arguments=QUIET_KERNEL,
        )
    except papermill.PapermillExecutionError as failure:
        error = f"cell {failure.cell_index} raised {failure.ename}: {failure.evalue}\n" + "\n".join(failure.traceback)
    except Exception as failure:  # papermill has no error of its own for a hung cell or a dead kernel
        error = f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - started
    return Execution(notebook.stem, output, seconds, len(code_cells(nbformat.read(notebook, as_version=4))), error)


def execute_in_place(notebook: Path) -> Execution:
    """Replace a committed notebook's outputs with those of a fresh run, and drop whatever changes from run to run."""
    document = nbformat.read(notebook, as_version=4)
    scratch = _fresh(ROOT / "build" / "execute" / notebook.stem)
    client = NotebookClient(
        document,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(scratch)}},
        record_timing=False,
        coalesce_streams=True,  # the cuts between messages differ from run to run
        extra_arguments=QUIET_KERNEL,
    )
    error = None
    started = time.perf_counter()
    try:
        client.execute()
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - started
    if error is None:
        # JupyterLab writes the same metadata, so a reader who opens and saves the notebook changes nothing.
        document.metadata = NotebookNode(
            kernelspec={"display_name": KERNEL_NAME, "language": "python", "name": "python3"},
            language_info=document.metadata.language_info,
        )
        nbformat.write(document, notebook)
    return Execution(notebook.stem, notebook, seconds, len(code_cells(document)), error)


def copy_to(directory: Path, notebooks: Sequence[Path]) -> None:
    """Copy notebooks to an empty directory, for a tool that runs notebooks in place."""
    _fresh(directory)
    for notebook in notebooks:
        shutil.copy(notebook, directory)


def code_cells(document: NotebookNode) -> list[NotebookNode]:
    """Return the code cells that are not empty."""
    return [cell for cell in document.cells if cell.cell_type == "code" and cell.source.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks in order, stop at the first that fails, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all lessons, then all labs")
    parser.add_argument("--in-place", action="store_true", help="write the outputs into the notebooks themselves")
    parser.add_argument("--copy-to", type=Path, metavar="DIRECTORY", help="copy the notebooks there; run nothing")
    options = parser.parse_args(arguments)
    notebooks = [path.resolve() for path in options.notebooks] or committed_notebooks()
    if not notebooks:
        print("There is no notebook in notebooks/.", file=sys.stderr)
        return 1
    if options.copy_to:
        copy_to(options.copy_to, notebooks)
        return 0
    done: list[Execution] = []
    for notebook in notebooks:
        print(f"[{len(done) + 1}/{len(notebooks)}] {notebook.stem} ...", flush=True)
        run = execute_in_place(notebook) if options.in_place else execute(notebook, progress_bar=sys.stderr.isatty())
        done.append(run)
        record(done)
        if run.error:
            print(f"\n{notebook.stem} failed: {run.error if sys.stdout.isatty() else _plain(run.error)}\n")
            print(f"The notebook as far as it ran: {_relative(run.output)}")
            return 1
        print(f"      {run.cells} cells in {run.seconds:.0f} s: {_relative(run.output)}", flush=True)
    print(f"{len(done)} notebooks in {sum(run.seconds for run in done):.0f} s, no errors")
    return 0


def record(executions: Sequence[Execution]) -> None:
    """Write wall times and errors to build/notebooks/times.json."""
    rows = [{**asdict(run), "output": _relative(run.output)} for run in executions]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "times.json").write_text(json.dumps(rows, indent=2) + "\n")


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _relative(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


if __name__ == "__main__":
    sys.exit(main())
