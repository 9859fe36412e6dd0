"""Ray cluster of a launch: join the one at ``RAY_ADDRESS``, or start one on this machine.

On this machine, Ray's workers are forked from a warm server (:mod:`tutorial_lib.launch.ray.server`), which loads torch,
transformers, DeepSpeed and Ray Train once, while Ray itself starts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tutorial_lib.config import Config, ConfigError, ParallelConfig, RunConfig
from tutorial_lib.doctor.machine import usable_cores
from tutorial_lib.launch.environment import ray_address
from tutorial_lib.launch.ray.lean_imports import setup_worker
from tutorial_lib.launch.warm_server import JOB_SIGNALS

CONNECT_TIMEOUT = 10
"""Seconds to wait for a connection to ``RAY_ADDRESS``."""

HEALTH_TIMEOUT = 60
"""Seconds to wait for the health check of the cluster at ``RAY_ADDRESS``."""

GROUP_START_SECONDS = 15
"""Seconds that Ray waits to reserve all slots of a run, which were free a moment ago, before it tries again."""

SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(GROUP_START_SECONDS),
    # Ray Train's own progress goes to its log files; a notebook cell shows our loss curve.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Seconds until the end of a worker is noticed.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Prestarted workers are useless here: Ray Train's processes have a runtime environment, which needs new ones. The
    # warm server forks those.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # By default, workers run at nice 15 and yield to every other program. The cost of that was not measured here.
    "RAY_worker_niceness": "0",
}

ON_ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Settings of a cluster on this machine alone: no cloud provider can preempt it, so nothing needs to watch for that."""


TOKEN = secrets.token_hex(32)
"""Token that a process needs to connect to a cluster that this process starts."""

_LEAN_IMPORTS = str(Path(__file__).with_name("lean_imports"))
"""Directory that is first on the import path of Ray's processes."""

_WORKER_VARIABLES = (setup_worker.SERVER_VARIABLE, setup_worker.RAY_SCRIPT_VARIABLE)

_changed_environment: dict[str, str | None] = {}


class _Server:
    """This process's handle on the warm server, which has loaded everything and forks workers on request."""

    def __init__(self) -> None:
        self._scratch = tempfile.mkdtemp(prefix="tutorial-lib-ray-")
        self.address = f"{self._scratch}/server"
        self._process: subprocess.Popen[bytes] | None = None
        self._made_for: tuple[str, dict[str, int]] | None = None
        self._cluster: dict[str, str] | None = None

    def renew(self, run: RunConfig, parallel: ParallelConfig) -> None:
        """Start the server if there is none, or restart it if source files or the kind of device have changed."""
        package = Path(__file__).parents[2]
        wanted = run.device, {str(path): path.stat().st_mtime_ns for path in package.rglob("*.py")}
        if self._process and self._process.poll() is None and self._made_for == wanted:
            return
        self._end()
        self._made_for = wanted
        # DeepSpeed chooses its device at import. If the server touched a GPU, forked workers could not use it.
        environment = {"DS_ACCELERATOR": run.device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with _lean_imports():
            # Import the package and its libraries from this process's paths, whatever is in the working directory.
            path = [_LEAN_IMPORTS, str(package.parent), *filter(None, sys.path)]
            environment["PYTHONPATH"] = os.pathsep.join(path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tutorial_lib.launch.ray.server", str(os.getpid()), self.address],
                env={**_cluster_environment(parallel.world_size), **os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C in a terminal must only reach the launching process.
                start_new_session=True,
            )
        self._tell()

    def serve(self, raylet: int, job: str) -> None:
        """Tell the server, and its successors, which cluster its workers belong to."""
        self._cluster = {**os.environ, "RAY_RAYLET_PID": str(raylet), "RAY_JOB_ID": job}
        self._tell()

    def serve_any(self) -> None:
        """Tell the server to fork workers for every node that asks. They import Ray themselves."""
        self._cluster = {}
        self._tell()

    def _tell(self) -> None:
        if self._process and self._process.stdin and self._cluster is not None:
            with suppress(BrokenPipeError):  # if the server is gone, Ray starts its workers itself
                self._process.stdin.write(json.dumps(self._cluster).encode() + b"\n")
                self._process.stdin.flush()

    def close(self) -> None:
        """End the server and every worker that was forked from it."""
        self._end()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None
        Path(self.address).unlink(missing_ok=True)


_server: _Server | None = None


def warm_up(run: RunConfig, parallel: ParallelConfig) -> None:
    """Start loading the libraries of Ray's workers in the background, and return at once; calling it again is safe.

    :func:`start` does this too. Call this earlier if there is other work to do in the meantime; :func:`stop` ends the
    server.
    """
    global _server
    if ray_address() or sys.platform != "linux" or os.environ.get("TUTORIAL_LIB_WARM_WORKERS") == "0":
        return
    if _server is None:
        _server = _Server()
    _server.renew(run, parallel)


def start(config: Config) -> bool:
    """Connect to the Ray cluster at ``RAY_ADDRESS``, or start one on this machine. :func:`stop` ends it.

    The local cluster has no dashboard, and grants one CPU slot per worker, so that four workers can share two cores.
    Ray's servers always listen on every network interface, but they only serve clients with the token that is created
    here and passed to Ray's processes in the environment (``RAY_AUTH_TOKEN``; ``RAY_AUTH_MODE=disabled`` turns that
    off).

    Returns:
        Whether anything was started: False if Ray was already running in this process.

    Raises:
        ConfigError: Ray cannot run from the path of this Python, or no cluster answers at ``RAY_ADDRESS``.
        RuntimeError: Ray did not start, and none of its processes is left; or it did not connect.
    """
    if " " in sys.executable and not ray_address():
        raise ConfigError(
            "Ray cannot start workers from a path that contains a space, like the path of this Python. Clone the "
            "course into a directory without spaces, or write launcher='local'."
        )
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with _lean_imports():
        import ray

    if ray.is_initialized():
        return False
    warm_up(config.run, config.parallel)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address := ray_address():
        _check_cluster(address)
        with _job_signals_blocked():
            try:
                ray.init(**quiet)
            except Exception as error:
                raise RuntimeError(f"Ray did not connect to RAY_ADDRESS={address!r}: {error}") from error
        return True
    cores, world_size = usable_cores(), config.parallel.world_size
    environment = _cluster_environment(config.parallel.world_size)
    changed = (*environment, "RAY_AUTH_MODE", *_WORKER_VARIABLES)
    _changed_environment.update({name: os.environ.get(name) for name in changed})
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    children = set(psutil.Process().children())
    try:
        with _lean_imports(), _workers_from_server(), _job_signals_blocked():
            # "local": do not join a cluster that another process has started on this machine.
            ray.init("local", num_cpus=max(world_size, cores), include_dashboard=False, **quiet)
        if _server:
            _server.serve(_raylet(children), ray.get_runtime_context().get_job_id())
    except BaseException as error:
        end_processes(set(psutil.Process().children()) - children)
        stop()
        if not isinstance(error, Exception):
            raise
        raise RuntimeError(f"Ray did not start: {error}\n{advise(error)}") from error
    return True


def _check_cluster(address: str) -> None:
    """Refuse an address where no Ray cluster answers: ``ray.init`` would retry for many minutes.

    Raises:
        ConfigError: says what is wrong with ``RAY_ADDRESS``.
    """
    what = f"RAY_ADDRESS is {address!r}"
    if "://" in address:
        raise ConfigError(
            f"{what}, but Ray Train does not run through Ray's client. Write HOST:PORT of the head node (the port is "
            "6379 unless you chose another), and start from a machine of the cluster."
        )
    instead = "Start the cluster or write its address; unset RAY_ADDRESS to start Ray on this machine."
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT):
                pass
        with _lean_imports():
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=HEALTH_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{what}, but no Ray cluster answers there within {error.timeout:.0f} s. {instead}") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no Ray cluster answers there"])[-1]
        raise ConfigError(f"{what}: {said.rstrip('.')}. {instead}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}, but nothing answers there ({error}). {instead}") from None


def advise(error: BaseException) -> str:
    """Return advice on an error from starting Ray, depending on its cause."""
    said = str(error)
    if "AF_UNIX path length" in said:
        return (
            f"The path of the temporary directory, {tempfile.gettempdir()}, is too long for Ray's sockets. Set TMPDIR "
            "to a shorter one, such as /tmp."
        )
    if isinstance(error, TimeoutError) or "timed out" in said.lower():
        load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
        return (
            f"Ray gives up if its processes need more than 30 s to start. Load averages are {load} on {usable_cores()} "
            "cores: end other programs and try again, or write launcher='local', which needs no Ray."
        )
    return (
        f"Ray's own logs are under {tempfile.gettempdir()}/ray/session_latest/logs. launcher='local' trains without "
        "Ray."
    )


def _raylet(before: set[psutil.Process]) -> int:
    """Return the process id of the raylet, one of this process's new children."""
    for process in set(psutil.Process().children()) - before:
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                return process.pid
    raise RuntimeError("its raylet ended at once")


def is_own() -> bool:
    """Return whether this process started the cluster."""
    return bool(_changed_environment)


def has_dashboard() -> bool:
    """Return whether the cluster that this process is connected to has a dashboard."""
    from ray._private.worker import _global_node

    return bool(_global_node and _global_node.webui_url)


def renew_server(run: RunConfig, parallel: ParallelConfig) -> None:
    """Restart the warm server if it cannot serve this configuration. Do nothing if there is none."""
    if _server:
        _server.renew(run, parallel)


def stop() -> None:
    """End the connection and, if :func:`start` started the cluster, the cluster with all its processes."""
    import ray

    ray.shutdown()
    _close_server()
    _drop_rays_interrupt_handler()
    for name, value in _changed_environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _changed_environment.clear()


def _drop_rays_interrupt_handler() -> None:
    """Make Ctrl-C raise ``KeyboardInterrupt`` again if Ray's own ``TorchTrainer.fit`` was called in this process.

    ``fit`` leaves a handler behind that would call a controller that has ended, and start another Ray to do so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if getattr(signal.getsignal(signal.SIGINT), "__module__", "").startswith("ray."):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _close_server() -> None:
    global _server
    if _server:
        _server.close()
        _server = None


@contextmanager
def _job_signals_blocked() -> Iterator[None]:
    """Keep a scheduler's signals from Ray's processes, so that the run can save before this process ends them.

    Ray's servers inherit the blocked signals. Otherwise a SIGTERM to all processes of a job would end them first, and
    the run could not save. ``ray.init`` also installs a SIGTERM handler that exits without saving.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        if before is not None:  # None means that the handler was not installed from Python
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def forked_workers(run: RunConfig, parallel: ParallelConfig) -> Iterator[None]:
    """Start a warm server for the block: Ray nodes that start within it fork their workers from there."""
    warm_up(run, parallel)
    try:
        with _lean_imports(), _workers_from_server():
            if _server:
                _server.serve_any()
            yield
    finally:
        _close_server()


@contextmanager
def _workers_from_server() -> Iterator[None]:
    """Make a cluster that starts within the block fork its workers from the warm server, if there is one."""
    if _server is None:
        yield
        return
    from ray._private import parameter, workers

    (ray_script,) = (Path(path) / "setup_worker.py" for path in workers.__path__)
    os.environ.update(zip(_WORKER_VARIABLES, (_server.address, str(ray_script)), strict=True))
    # The log monitor would forward the workers' output, which already goes to their own files.
    ours: dict[str, Any] = {"setup_worker_path": f"{_LEAN_IMPORTS}/setup_worker.py", "include_log_monitor": False}
    with mock.patch.object(parameter, "RayParams", partial(parameter.RayParams, **ours)):
        yield


def _cluster_environment(num_workers: int) -> dict[str, str]:
    """Return the environment of a cluster on this machine and of the warm server: Ray reads it at import."""
    threads = max(1, usable_cores() // num_workers)
    environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", **ON_ONE_MACHINE}
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        # Without this, Ray would store a token in the home directory, where it would outlive the cluster.
        environment["RAY_AUTH_TOKEN"] = TOKEN
    return environment


def end_processes(processes: set[psutil.Process]) -> None:
    # Ray itself would only end these processes when this process ends.
    trees = {child for process in processes for child in (process, *process.children(recursive=True))}
    for process in trees:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(trees), timeout=10)


@contextmanager
def _lean_imports() -> Iterator[None]:
    """Keep this process, and the processes that Ray starts, from importing the packages that ``lean_imports`` hides."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_LEAN_IMPORTS, *([before] if before else [])])
    sys.path.insert(0, _LEAN_IMPORTS)
    try:
        yield
    finally:
        sys.path.remove(_LEAN_IMPORTS)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextmanager
def session(config: Config) -> Iterator[None]:
    """Provide a Ray cluster while the block runs. If one exists already, use it and leave it running."""
    started = start(config)
    try:
        yield
    finally:
        if started:
            stop()
