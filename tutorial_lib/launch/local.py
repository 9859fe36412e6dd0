"""Local launcher: ranks as processes on this machine, forked from a warm server.

The first launch starts the server (:mod:`tutorial_lib.launch.warm_server`), which loads torch, transformers and
DeepSpeed while the launching process checks the configuration; :func:`warm_up` starts it earlier. Later launches find
it ready. Each launch gets new processes, which find each other through a new file instead of a port. gloo uses the
loopback interface, so nothing outside this machine can connect.

``TUTORIAL_LIB_WARM_WORKERS=0`` in the environment starts each rank as a new interpreter instead.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any

from tutorial_lib.config import Config
from tutorial_lib.doctor.machine import usable_cores
from tutorial_lib.launch.errors import WorkerError, first_error, next_start
from tutorial_lib.launch.warm_server import MODULES, Job
from tutorial_lib.launch.watch import POLL_SECONDS
from tutorial_lib.records import RunDirectory, lost_another_rank

WORKER = "tutorial_lib.launch.worker"

_NOTICED_SECONDS = 2.0
"""Longest delay, in seconds, until a killed rank's end is noticed."""

PEERS_SECONDS = 10
"""Seconds that the other ranks get to end after one has failed."""

_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]

_HARMLESS = frozenset(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME DS_ACCELERATOR "
    "PYTHONBREAKPOINT PYTORCH_NVML_BASED_CUDA_CHECK PYTEST_CURRENT_TEST".split()
)
"""Environment variables that may change without requiring a new server, because ranks get them after the fork."""


def warm_up(device: str = "cpu") -> None:
    """Start loading the libraries of local runs in the background, and return at once; calling it again is safe."""
    _idle.append(_idle_or_new_server(device))


def launch(
    configs: Sequence[Config], poll: Callable[[], None], worker: str = WORKER, arguments: Sequence[str] = ()
) -> None:
    """Run the configurations one after the other on ``dp x tp`` new processes.

    Args:
        configs: what to run; all need the same number of ranks and the same device.
        poll: called a few times per second while the ranks run.
        worker: module that every rank runs; it has a ``main(configs_file, rendezvous_file, *arguments)``.
        arguments: further arguments of its ``main``.

    Raises:
        ConfigError: a rank refused the configuration.
        WorkerError: a rank failed. All ranks have ended when either error is raised.
    """
    directories = [RunDirectory(config.directory) for config in configs]
    scratch = Path(tempfile.mkdtemp(prefix="tutorial-lib-"))
    server = _idle_or_new_server(configs[0].run.device)
    try:
        outputs = [scratch / f"rank-{rank:03d}.out" for rank in range(configs[0].parallel.world_size)]
        failures = server.run(
            _job(configs, scratch, outputs, worker, arguments),
            poll,
            is_stopped=lambda: any(directory.stop_file.exists() for directory in directories),
        )
        if failures and not _ended_by_request(failures, directories):
            raise _error(failures, outputs, directories)
    except KeyboardInterrupt:
        # This is the second interrupt: the first only asked the ranks to save. Under run_loop, it is the first.
        server.close(patience=0)
        raise
    except _ServerDied as died:
        server.close()  # returns once the ranks have saved and ended
        raise WorkerError(
            f"The process that starts the ranks has died with exit code {server.exit_code}{_cause(server.exit_code)}. "
            f"{next_start(directories)} Its output:\n{died}"
        ) from died
    finally:
        if server.is_busy:
            # After an interrupt the state of the message stream is unknown, so the server cannot be used again.
            server.close()
        else:
            _idle.append(server)
        shutil.rmtree(scratch, ignore_errors=True)


def stop_server() -> None:
    """End the idle servers of this process. This is optional: they end with the process that started them."""
    while _idle:
        _idle.pop().close()


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank that ended with a nonzero exit code.

    Attributes:
        rank: number of the rank.
        exit_code: 1 after an exception; after a signal, minus the signal's number.
        time: when its end was noticed, in seconds since 1970.
        killed_by_launcher: whether the launcher killed it because it did not end after another rank had failed.
    """

    rank: int
    exit_code: int
    time: float
    killed_by_launcher: bool = False


class _ServerDied(Exception):
    """The server has ended too early. The message is its output."""


class _Server:
    """This process's handle on a server (see :mod:`tutorial_lib.launch.warm_server`)."""

    def __init__(self, device: str) -> None:
        self.made_for = _state(device)
        self.is_busy = self.is_closed = False
        self._has_started = False
        self._owner = os.getpid()
        ours, theirs = socketpair()
        self._output = tempfile.TemporaryFile()
        self._connection = Connection(ours.detach())
        # Import the package and its libraries from this process's paths, whatever is in the working directory.
        program = [sys.executable, "-P", "-m", "tutorial_lib.launch.warm_server"]
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        # DeepSpeed chooses its device at import. The server itself must not touch the GPU (see its module).
        special = {"DS_ACCELERATOR": device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": path}
        with theirs:
            self._process = subprocess.Popen(
                [*program, str(os.getpid()), str(theirs.fileno()), *_modules()],
                env={**os.environ, **special},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                # Ctrl-C in a terminal must only reach this process, which then asks the ranks to save and stop.
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int:
        """Exit code of the server, once it is closed."""
        return int(self._process.returncode)

    @property
    def is_usable(self) -> bool:
        return self._owner == os.getpid() and self._process.poll() is None

    def run(self, job: Job, poll: Callable[[], None], is_stopped: Callable[[], bool]) -> list[Failure]:
        """Start the ranks, wait until they have ended, and return those that failed.

        Args:
            job: the ranks to start.
            poll: called a few times per second.
            is_stopped: returns whether the runs were asked to stop. If the request comes before the ranks start, none
                starts.

        Raises:
            _ServerDied: the server itself has died.
        """
        if is_stopped():
            return []
        self.is_busy, self._has_started = True, False
        self._send("start", job)
        left, failures, patience, has_killed = len(job.environments), list[Failure](), float("inf"), False
        while left:
            kind, *content = self._receive()
            if kind == "started":
                self._has_started = True
            elif kind == "ended":
                left -= 1
                rank, exit_code, ended = content
                if exit_code:
                    failures.append(Failure(rank, exit_code, ended, has_killed and exit_code == -signal.SIGKILL))
                if len(failures) == 1 and patience == float("inf"):
                    self._send("signal", signal.SIGTERM)
                    patience = time.monotonic() + PEERS_SECONDS
            elif time.monotonic() > patience:
                self._send("signal", signal.SIGKILL)
                has_killed = True
            elif not self._has_started and is_stopped():
                return []  # the server is still busy, so the caller closes it
            poll()
        self.is_busy = self._has_started = False
        return failures

    def _send(self, kind: str, content: object) -> None:
        try:
            self._connection.send((kind, content))
        except OSError as error:
            raise self._server_error() from error

    def _receive(self) -> tuple[Any, ...]:
        """Return the server's next message, or one with an empty kind if none comes within a moment."""
        try:
            return self._connection.recv() if self._connection.poll(POLL_SECONDS) else ("",)
        except (EOFError, OSError) as error:
            raise self._server_error() from error

    def _server_error(self) -> _ServerDied:
        self._output.seek(0)
        return _ServerDied(self._output.read().decode(errors="replace"))

    def close(self, patience: float = PEERS_SECONDS) -> None:
        """Ask any ranks to save and stop, kill those left after ``patience`` seconds, and end the server."""
        if self._owner != os.getpid() or self.is_closed:
            return
        self.is_closed = True
        self._connection.close()
        try:
            # Ranks save and stop even if the server was killed. This can wait for them: they share its process group.
            end = time.monotonic() + (patience if self._has_started else 0)
            while time.monotonic() < end and self._is_any_alive():
                time.sleep(0.05)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._output.close()

    def _is_any_alive(self) -> bool:
        """Return whether the server or a rank is alive; together they are one process group."""
        self._process.poll()  # reaps a server that has ended, which would otherwise still count
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


_idle: list[_Server] = []
_idle_lock = threading.Lock()
atexit.register(stop_server)


def _idle_or_new_server(device: str) -> _Server:
    """Return an idle server with this process's current modules and environment; start one if needed."""
    wanted = _state(device)
    with _idle_lock:
        for server in list(_idle):
            if server.is_usable and server.made_for == wanted:
                _idle.remove(server)
                return server
            if server.made_for["device"] == device:
                _idle.remove(server)
                server.close()
    return _Server(device)


def _state(device: str) -> dict[str, object]:
    """Return everything that a server inherits or reads only once. If it changes, a new server is needed."""
    package = Path(__file__).parents[1]
    return {
        "device": device,
        "modules": _modules(),
        "sources": {str(path): path.stat().st_mtime_ns for path in package.rglob("*.py")},
        "inherited": (os.sched_getaffinity(0), os.nice(0), *map(resource.getrlimit, _LIMITS)),
        "path": tuple(sys.path),
        "environment": {
            name: value for name, value in os.environ.items() if name not in _HARMLESS and not name.startswith("RAY_")
        },
    }


def _modules() -> tuple[str, ...]:
    """Return the modules for a server to import: none for a cold one."""
    return () if os.environ.get("TUTORIAL_LIB_WARM_WORKERS") == "0" else MODULES


def _job(
    configs: Sequence[Config], scratch: Path, outputs: Sequence[Path], worker: str, arguments: Sequence[str]
) -> Job:
    configs_file = scratch / "configs.json"
    configs_file.write_text(json.dumps([config.flat() for config in configs]))
    world_size = len(outputs)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // world_size)),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    size = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    shared = {**defaults, **os.environ, **size}  # shared by all ranks, so that a pickle holds each string only once
    return Job(
        module=worker,
        arguments=(str(configs_file), str(scratch / "rendezvous"), *arguments),
        environments=tuple({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)),
        outputs=tuple(map(str, outputs)),
        directory=os.getcwd(),
        path=tuple(sys.path),
    )


def _ended_by_request(failures: Sequence[Failure], directories: Sequence[RunDirectory]) -> bool:
    """Return whether the ranks were asked to stop, and only the signal itself ended those that failed."""
    asked = any(directory.stop_file.exists() for directory in directories)
    by_signal = all(failure.exit_code in (-signal.SIGTERM, -signal.SIGUSR1) for failure in failures)
    return asked and by_signal and not any(directory.errors() for directory in directories)


def _error(failures: Sequence[Failure], outputs: Sequence[Path], directories: Sequence[RunDirectory]) -> Exception:
    """Return the error of the rank that failed first: its own message, if it left one."""
    written = [record for directory in directories for record in directory.errors()]
    failure = first_failure(failures, written)
    if _is_fatal(failure) and failure.rank not in {record["rank"] for record in written}:
        peers = [f"\n\nRank {r['rank']} failed with {r['type']}: {r['message']}" for r in written]
        return WorkerError("".join([_describe(failure, outputs, directories), *peers]))
    if unrecorded := unrecorded_failure(failures, written, [_printed(output) for output in outputs]):
        return WorkerError(_describe(unrecorded, outputs, directories))
    return first_error(directories, _describe(failure, outputs, directories))


def first_failure(failures: Sequence[Failure], written: Sequence[dict[str, Any]]) -> Failure:
    """Return the failure that caused the others.

    A rank that was killed by a signal cannot say why. Its peers fail as soon as they lose it, so their errors may be
    noticed a moment before its end. If the signal comes later than that, it is a consequence itself: a collective that
    lost its peer may abort, and the launcher kills ranks that do not end.
    """
    own = [failure for failure in failures if not failure.killed_by_launcher] or list(failures)
    first = min([failure.time for failure in own] + [record["time"] for record in written])
    return min(own, key=lambda f: (not _is_fatal(f) or f.time > first + _NOTICED_SECONDS, f.time))


def unrecorded_failure(
    failures: Sequence[Failure], written: Sequence[dict[str, Any]], printed: Sequence[str]
) -> Failure | None:
    """Return the first failure whose rank printed its error, but could not record it, perhaps because the disk is full.

    Return None if there is none, or if a rank recorded more than the loss of another one.

    Args:
        failures: the ranks that failed.
        written: the errors that ranks recorded.
        printed: what each rank printed.
    """
    recorded = {record["rank"] for record in written}
    if not all(map(lost_another_rank, written)):
        return None
    for failure in sorted(failures, key=lambda f: f.time):
        text = printed[failure.rank]
        if failure.exit_code > 0 and failure.rank not in recorded and text:
            if not lost_another_rank({"message": _last_exception(text)}):
                return failure
    return None


def _is_fatal(failure: Failure) -> bool:
    """Return whether a signal killed the rank before it could say why, so that its peers' errors are consequences.

    SIGTERM is no such signal, because the launcher sends it to the peers of a rank that has failed.
    """
    return failure.exit_code < 0 and failure.exit_code != -signal.SIGTERM


def _cause(exit_code: int) -> str:
    """Return the signal behind an exit code, for the end of a sentence; empty if there is none."""
    if exit_code == -signal.SIGKILL:
        return ": it was killed, perhaps for lack of memory"
    return f": signal {-exit_code} ({signal.strsignal(-exit_code)}) ended it" if exit_code < 0 else ""


def _describe(failure: Failure, outputs: Sequence[Path], directories: Sequence[RunDirectory]) -> str:
    """Describe the end of a rank that wrote no error."""
    printed = _printed(outputs[failure.rank])
    ended = f"Rank {failure.rank} ended with exit code {failure.exit_code} and "
    if failure.exit_code > 0 and printed:
        return f"{ended}could not record its error. It printed:\n{_last_exception(printed)}\n\n{printed}"
    return (
        f"{ended}left no traceback{_cause(failure.exit_code)}. {next_start(directories)} The end of its output:\n"
        + _last_output(failure.rank, printed, directories)
    )


def _printed(output: Path) -> str:
    """Return what a rank printed outside its runs."""
    return output.read_text(errors="replace").strip() if output.exists() else ""


def _last_exception(printed: str) -> str:
    """Return the line of the last exception in a rank's output, which more output may follow."""
    _, traceback, after = printed.rpartition("Traceback (most recent call last):\n")
    lines = after.splitlines()
    return next((line for line in lines if traceback and line and not line.startswith(" ")), lines[-1])


def _last_output(rank: int, printed: str, directories: Sequence[RunDirectory], lines: int = 20) -> str:
    """Return the last lines of a rank's output: those in its newest run's log, and those printed outside its runs."""
    logs = [path for path in (directory.log_file(rank) for directory in directories) if path.is_file()]
    newest = max(logs, key=lambda log: log.stat().st_mtime, default=None)
    parts = [newest.read_text(errors="replace") if newest else "", printed]
    return "\n".join(line for part in parts for line in part.splitlines()[-lines:])
