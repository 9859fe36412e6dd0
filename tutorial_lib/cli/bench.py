"""Command ``bench``: matrices of runs side by side, and the difference between two of them."""

from __future__ import annotations

import argparse
import json
import sys

from tutorial_lib.cli import train
from tutorial_lib.cli.options import DONE, FAILED, STOPPED, given, reserve_stdout_for_json
from tutorial_lib.config import Config

DEFAULT_STEPS = 20

MATRICES = {
    "zero-stages": "one plain process, then ZeRO's stages 0 to 3",
    "offload": "stages 1 to 3, each without and with offload (and pinned memory on a GPU)",
    "weak-scaling": "1, 2 and 4 data-parallel ranks with the same work per rank (--global-batch is per rank)",
    "strong-scaling": "1, 2 and 4 data-parallel ranks with the same global batch",
}


_ROWS_HELP = (
    "run only these rows: names from the matrix, dp-N, or the workshop, such as 2ZO-1G1N (stage 2, offload, 1 GPU, "
    "1 node)"
)
_INTERVAL_HELP = "time between readings of the memory of all processes and GPUs (default: 0.5)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a command for each matrix, with all settings of ``train``, and the command ``compare``."""
    parser.description = (
        "Run the same training in several ways, each row in its own processes, and compare the costs. Run the same "
        "command again to continue: finished rows are kept, and an interrupted one starts over."
    )
    commands = parser.add_subparsers(required=True, metavar="MATRIX")
    for name, help in MATRICES.items():
        page = commands.add_parser(name, help=help, description=help)
        page.add_argument("--rows", nargs="+", default=(), metavar="ROW", help=_ROWS_HELP)
        page.add_argument("--retry", action="store_true", help="run failed rows again")
        page.add_argument("--sample-interval", type=float, default=0.5, metavar="SECONDS", help=_INTERVAL_HELP)
        page.add_argument("--keep-checkpoints", action="store_true", help="keep the checkpoints of finished rows")
        train.add_arguments(page)
        _add_json(page)
        page.set_defaults(part=_run, experiment=name)
    page = commands.add_parser("compare", help="compare memory and runtime of two rows, or of two matrices row by row")
    page.add_argument("without", help="MATRIX/ROW, MATRIX, or a directory of either")
    page.add_argument("with_", metavar="with", help="the row or matrix to compare with it")
    page.add_argument("--storage", default="runs", help="directory of the matrices (default: runs)")
    _add_json(page)
    page.set_defaults(part=_compare)


def _add_json(page: argparse.ArgumentParser) -> None:
    page.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text")


def main(options: argparse.Namespace) -> int:
    """Run a matrix or compare two, and return the exit code."""
    return int(options.part(options))


def _run(options: argparse.Namespace) -> int:
    flat = {"name": options.experiment} | given(options)
    if not flat.keys() & {"steps", "epochs"}:
        flat["steps"] = DEFAULT_STEPS
    config = Config.create(options.profile, **flat)

    from tutorial_lib import bench
    from tutorial_lib.bench.table import remarks
    from tutorial_lib.launch import Interrupted

    progress = None if options.json else bench.MatrixProgress()
    with reserve_stdout_for_json(options.json):
        try:
            matrix = bench.run_matrix(
                options.experiment, config, rows=options.rows, retry=options.retry,
                sample_interval=options.sample_interval, keep_checkpoints=options.keep_checkpoints, progress=progress,
            )  # fmt: skip
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            return STOPPED
    if options.json:
        print(json.dumps({"directory": str(matrix.path), "rows": [row.to_dict() for row in matrix.rows]}))
    else:
        print("\n\n".join([str(matrix.table("speed")), str(matrix.table("memory")), *remarks(matrix.rows)]))
        print(f"\n{matrix.path}: matrix.json, table.csv, table.md, figures")
    return DONE if all(row.is_done for row in matrix.rows) else FAILED


def _compare(options: argparse.Namespace) -> int:
    from tutorial_lib.bench.compare import compare

    result = compare(options.without, options.with_, storage=options.storage)
    print(json.dumps(result.to_dict()) if options.json else result.table())
    return DONE
