"""Page ``docs/faults.md``: every fault that a test injects, and how a run survives it.

Each such test carries ``@pytest.mark.fault(happens, outcome)``, one mark per fault. The marks are read from the source
of the test files in ``tests/distributed`` and ``tests/cluster``, so nothing has to be imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.faults import outcomes
from tutorial_lib.tables import Table

TESTS = Path(__file__).resolve().parents[2]
PAGE = TESTS.parent / "docs" / "faults.md"

GROUPS = {
    "ranks": ("distributed/faults/test_*.py",),
    "ray": ("cluster/test_ray.py",),
    "torchrun": ("cluster/test_slurm.py", "cluster/test_torchrun.py", "distributed/test_torchrun.py"),
}
"""The page's groups of faults, with patterns for the paths of each group's files below ``tests``."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        happens: description of the fault.
        outcome: how the run survives it.
    """

    happens: str
    outcome: str


def faults_by_group() -> dict[str, list[Fault]]:
    """Return the faults that the tests of each group are marked with, in the order of files, from top to bottom."""
    faults: dict[str, list[Fault]] = {group: [] for group in GROUPS}
    for folder in ("distributed", "cluster"):
        for file in sorted((TESTS / folder).rglob("test_*.py")):
            if found := faults_of(file.read_text(encoding="utf-8")):
                faults[group_of(file)] += found
    return faults


def group_of(file: Path) -> str:
    """Return the page's group for a test file."""
    path = file.relative_to(TESTS)
    for group, files in GROUPS.items():
        if any(path.match(pattern) for pattern in files):
            return group
    raise AssertionError(f"tests/{path} has tests marked with a fault: add it to a group in page.GROUPS")


def faults_of(source: str) -> list[Fault]:
    """Return the faults in the marks of a test file's source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                assert node.name.startswith("test_"), f"{node.name} is marked with a fault, but is not a test"
                found.append(Fault(*map(_value_of, decorator.args)))
    return found


def _value_of(argument: ast.expr) -> str:
    """Return a mark's argument: a string, or the name of a shared outcome."""
    if isinstance(argument, ast.Name):
        return str(getattr(outcomes, argument.id))
    return str(ast.literal_eval(argument))


def _table(faults: Iterable[Fault]) -> str:
    rows = tuple((fault.happens, fault.outcome) for fault in faults)
    return Table(("what happens", "what the run does"), rows, (False, False)).markdown()


def text() -> str:
    """Return the text of ``docs/faults.md``."""
    on_ranks, on_ray_nodes, between_nodes = faults_by_group().values()
    return f"""\
# What a run survives

The tests in `tests/distributed/faults` inject each of these {len(on_ranks)} faults into a real run. Wherever the run
resumes, each step's loss and the final weights equal the uninterrupted run's bit for bit, and no intact checkpoint is
lost. The tests run on CPUs; [lesson 04](../notebooks/04_checkpoints.ipynb) says what GPUs need for that.

{_table(on_ranks)}

## On several nodes

`tests/cluster/test_ray.py` injects these {len(on_ray_nodes)} faults on a Ray cluster of virtual nodes. Where the number
of ranks changes, each step has the same examples, and losses match the uninterrupted run's to 1e-6: sums add up in a
different order.

{_table(on_ray_nodes)}

The files `test_torchrun.py` and `test_slurm.py` in `tests/cluster` and `tests/distributed` inject these
{len(between_nodes)} faults under torchrun and a real SLURM.

{_table(between_nodes)}

`python -m tests.distributed.faults` writes this page.
"""
