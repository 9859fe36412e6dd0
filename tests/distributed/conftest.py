"""Shared launches: one per number of ranks for all tests that can share it, because starting processes is slow.

``make distributed`` runs two groups of tests at a time. Files that share a launch are one group, in one pytest process.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.distributed.cases import interruption, reshaping, shared, small_runs
from tests.distributed.observing.comparing import Observed
from tests.distributed.observing.probe import ProbedRun, observe
from tests.support.launching import Shell
from tutorial_lib.config import Config

LONGEST_GROUPS = ("launched", "faults")
TIMEOUT = 1800
"""Timeout of a test in seconds. It is long, because any test may be the one that waits for all shared launches."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    sharing = {item.path for item in ours if "launched" in getattr(item, "fixturenames", ())}
    for item in ours:
        group = (
            "launched" if item.path in sharing else "faults" if item.path.parent.name == "faults" else item.path.stem
        )
        item.add_marker(pytest.mark.xdist_group(group))
        if not any(item.iter_markers("timeout")):
            item.add_marker(pytest.mark.timeout(TIMEOUT))
    items.sort(key=_place_in_order)


def _place_in_order(item: pytest.Item) -> int:
    """Return 0 for the longest groups, which start first so that short ones keep both processes busy to the end."""
    group = item.get_closest_marker("xdist_group")
    return 0 if group is None or group.args[0] in LONGEST_GROUPS else 1


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the directory of models, data and all shared runs, and remove it afterwards because it is large."""
    directory = tmp_path_factory.mktemp("distributed")
    small_runs.make_inputs(directory)
    (directory / "runs").mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def launched(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Config]]:
    """Return a function that launches all shared runs on a number of ranks and returns their configurations."""

    @functools.cache
    def attempt(ranks: int) -> dict[str, Config] | Exception:
        _claim(f"on-{ranks}-ranks", tmp_path_factory)
        runs = shared.shared_runs(directory, ranks)
        try:
            observe(runs)
        except Exception as error:  # remembered, so that a failed launch is not repeated
            return error
        return _by_name(runs)

    def launch(ranks: int) -> dict[str, Config]:
        outcome = attempt(ranks)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return launch


def _claim(launch: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fail if another pytest process of this session has made the same launch, which silently doubles the time.

    This happens where pytest-xdist ignores groups, as it does with pytest 9.2 (pytest-xdist's issue 1386).
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    claimed_by = tmp_path_factory.getbasetemp().parent / launch
    if claimed_by.exists() and psutil.pid_exists(int(claimed_by.read_text())):  # else this process replaces a dead one
        pytest.fail(f"two pytest processes made the launch {launch}: pytest-xdist ignores the groups of tests")
    claimed_by.write_text(str(os.getpid()))


@pytest.fixture(scope="session")
def observed(launched: Callable[[int], dict[str, Config]]) -> Callable[[int, str], Observed]:
    """Return a function that reads a shared run by its number of ranks and its name."""

    @functools.lru_cache(maxsize=16)
    def read(ranks: int, name: str) -> Observed:
        runs = launched(ranks)
        assert name in runs, f"{name} is not run: add it to equivalence.NEEDED, or choose another"
        return Observed.read(runs[name])

    return read


@pytest.fixture(scope="session")
def resumed(directory: Path, launched: Callable[[int], dict[str, Config]]) -> Callable[[str], Observed]:
    """Return a function that reads a run of ``interruption.resumed_runs`` after its second start, by name."""
    launched(2)
    runs = interruption.resumed_runs(directory)
    observe(runs)
    by_name = _by_name(runs)
    return lambda name: Observed.read(by_name[name])


@pytest.fixture(scope="session")
def reshaped(directory: Path, launched: Callable[[int], dict[str, Config]]) -> Callable[[str], Observed]:
    """Return a function that reads a run of ``reshaped_runs`` after its start in a different shape, by name."""

    @functools.cache
    def launch() -> dict[str, Config]:
        by_name = {}
        for ranks in (1, 2, 4):
            launched(ranks)
        for ranks in (4, 2, 1):  # one run is saved on four ranks and continues on one
            runs = reshaping.reshaped_runs(directory, ranks)
            observe(runs)
            by_name |= _by_name(runs)
        return by_name

    return lambda name: Observed.read(launch()[name])


def _by_name(runs: Sequence[ProbedRun]) -> dict[str, Config]:
    return {run.config.run.name: run.config for run in runs}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.end()
