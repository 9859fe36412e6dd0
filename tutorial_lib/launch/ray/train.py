"""Start the ranks as Ray Train workers, here or on a Ray cluster.

Ray Train places the workers and sets up the process group; the training function is the same as everywhere. Each
worker writes its own files straight to the run's storage, and ``ray.train.report`` only registers the finished
checkpoint (``NO_UPLOAD``): Ray then knows the newest one, and nothing is copied twice.

On this machine, Ray's workers are forked from a warm server (:mod:`tutorial_lib.launch.ray.server`), which loads torch,
transformers, DeepSpeed and Ray Train once, while Ray itself starts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.doctor.machine import usable_cores
from tutorial_lib.launch import WorkerError, first_error, wait_for
from tutorial_lib.records import RunDirectory

START_TIMEOUT = 600
"""Seconds that Ray has to start the first worker. On a busy laptop it takes a minute or two."""

_GROUP_START_SECONDS = 60
"""Seconds that Ray waits for all slots of a run at once before it counts that as a failure and tries again."""

_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_GROUP_START_SECONDS),
    # Ray Train's own progress goes to its log files; a notebook cell shows our curve.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # How long the end of the workers may go unnoticed, seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Prestarted worker processes are of no use: what Ray Train starts has a runtime environment, and so processes of
    # its own. The warm server forks those.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # By default workers give way to every other program (nice 15). What that costs here was not measured.
    "RAY_worker_niceness": "0",
}


_TOKEN = secrets.token_hex(32)
"""Required to connect to a cluster that this process starts."""

_LEAN_PATH = str(Path(__file__).with_name("path"))

_END_SECONDS = 3
"""Seconds that the workers of an interrupted fit may take to end before they are killed."""

_TITLES = ("ray::TrainController", "ray::RayTrainWorker", "ray::SynchronizationActor", "ray::DatasetManager")
"""Beginnings of the titles of a fit's processes."""

_changed_environment: dict[str, str | None] = {}


class _Server:
    """This process's end of the warm server: a process that has loaded everything, and a socket to ask it for forks."""

    def __init__(self) -> None:
        self._scratch = tempfile.mkdtemp(prefix="tutorial-lib-ray-")
        self.address = f"{self._scratch}/server"
        self._process: subprocess.Popen[bytes] | None = None
        self._made_for: tuple[str, dict[str, int]] | None = None
        self._cluster: dict[str, str] = {}

    def renew(self, config: Config) -> None:
        """Start the server if it is not there, or cannot follow: other source files, or another kind of device."""
        package = Path(__file__).parents[2]
        wanted = config.run.device, {str(path): path.stat().st_mtime_ns for path in package.rglob("*.py")}
        if self._process and self._process.poll() is None and self._made_for == wanted:
            return
        self._end()
        self._made_for = wanted
        # DeepSpeed decides at import what it computes on. A GPU that the server touches could not be used after a fork.
        environment = {"DS_ACCELERATOR": config.run.device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with _lean_imports():
            # The package and its libraries are those of this process, whatever lies in the working directory.
            path = [_LEAN_PATH, str(package.parent), *filter(None, sys.path)]
            environment["PYTHONPATH"] = os.pathsep.join(path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tutorial_lib.launch.ray.server", str(os.getpid()), self.address],
                env={**_of_a_cluster(config), **os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C in a terminal is for the launching process.
                start_new_session=True,
            )
        self._tell()

    def serve(self, raylet: int, job: str) -> None:
        """Tell the server, and those that take its place, which cluster its workers are for."""
        self._cluster = {**os.environ, "RAY_RAYLET_PID": str(raylet), "RAY_JOB_ID": job}
        self._tell()

    def _tell(self) -> None:
        if self._process and self._process.stdin and self._cluster:
            with suppress(BrokenPipeError):  # the server is gone: Ray starts its workers itself
                self._process.stdin.write(json.dumps(self._cluster).encode() + b"\n")
                self._process.stdin.flush()

    def close(self) -> None:
        """End the server, and with it every worker that was forked from it."""
        self._end()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None
        Path(self.address).unlink(missing_ok=True)


_server: _Server | None = None


def warm_up(config: Config) -> None:
    """Start loading what Ray's workers on this machine need, in the background. Returns at once; safe to call again.

    :func:`start` does so too. Call it earlier if there is something else to do meanwhile; :func:`stop` ends it.
    """
    global _server
    if os.environ.get("RAY_ADDRESS") or sys.platform != "linux" or os.environ.get("TUTORIAL_LIB_WARM_WORKERS") == "0":
        return
    if _server is None:
        _server = _Server()
    _server.renew(config)


def start(config: Config) -> bool:
    """Connect to the Ray cluster named by ``RAY_ADDRESS``, or start one on this machine. :func:`stop` ends it.

    The local one has no dashboard and grants as many CPU slots as there are workers, so that four workers can share
    two cores. Ray's servers listen on every network interface, whatever address they are given; they serve only who
    has the token that is made here and handed to Ray's processes in the environment (``RAY_AUTH_TOKEN``;
    ``RAY_AUTH_MODE=disabled`` turns that off).

    Returns:
        Whether anything was started: False if Ray was running in this process already.

    Raises:
        ConfigError: Ray cannot run from where this Python is.
        RuntimeError: Ray did not start. None of its processes is left.
    """
    if " " in sys.executable and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "Ray cannot start workers from a path with a space in it, and this Python's has one. Clone the course into "
            "a directory without spaces, or write launcher='local'."
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with _lean_imports():
        import ray

    if ray.is_initialized():
        return False
    warm_up(config)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        with _keeping_sigterm():
            ray.init(**quiet)
        return True
    cores, world_size = usable_cores(), config.parallel.world_size
    of_a_cluster = _of_a_cluster(config)
    _changed_environment.update({name: os.environ.get(name) for name in (*of_a_cluster, "RAY_AUTH_MODE", *_TO_SERVER)})
    for name, value in of_a_cluster.items():
        os.environ.setdefault(name, value)
    children = set(psutil.Process().children())
    try:
        with _lean_imports(), _workers_from_server(), _keeping_sigterm():
            # "local": not one that somebody else has started on this machine.
            ray.init("local", num_cpus=max(world_size, cores), include_dashboard=False, **quiet)
        if _server:
            _server.serve(_raylet(children), ray.get_runtime_context().get_job_id())
    except BaseException as error:
        _end_processes(set(psutil.Process().children()) - children)
        stop()
        if not isinstance(error, Exception):
            raise
        load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
        raise RuntimeError(
            f"Ray did not start: {error}\nIt gives up when its processes need more than 30 s. Load averages are {load} "
            f"on {cores} cores: end other programs and try again, or write launcher='local', which needs no Ray."
        ) from error
    return True


def _raylet(before: set[psutil.Process]) -> int:
    """Return the process id of the raylet among the children of this process that were not there before."""
    for process in set(psutil.Process().children()) - before:
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                return process.pid
    raise RuntimeError("its raylet ended at once")


def stop() -> None:
    """End the connection, and the cluster if :func:`start` started one. Its processes are gone afterwards."""
    import ray

    global _server
    ray.shutdown()
    if _server:
        _server.close()
        _server = None
    for name, value in _changed_environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _changed_environment.clear()


_TO_SERVER = ("TUTORIAL_LIB_RAY_SERVER", "TUTORIAL_LIB_RAY_SETUP_WORKER")
"""Environment variables that ``ray_path/setup_worker.py`` reads in each new process of Ray."""


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Put this process's handler of SIGTERM back afterwards: ``ray.init`` installs one that exits without a save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # None: a handler that is not Python's
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _workers_from_server() -> Iterator[None]:
    """Have the cluster that is started meanwhile get its workers from the warm server, if there is one."""
    if _server is None:
        yield
        return
    from ray._private import parameter, workers

    (rays_own,) = (Path(path) / "setup_worker.py" for path in workers.__path__)
    os.environ.update(zip(_TO_SERVER, (_server.address, str(rays_own)), strict=True))
    # The log monitor would hand the workers' output on, which goes to their own files.
    ours: dict[str, Any] = {"setup_worker_path": f"{_LEAN_PATH}/setup_worker.py", "include_log_monitor": False}
    with mock.patch.object(parameter, "RayParams", partial(parameter.RayParams, **ours)):
        yield


def _of_a_cluster(config: Config) -> dict[str, str]:
    """The environment that a cluster on this machine gets, and the warm server too: Ray reads it at import."""
    threads = max(1, usable_cores() // config.parallel.world_size)
    environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process that asks whether this machine is taken away
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        # Otherwise Ray makes a token that outlives the cluster, in the home directory.
        environment["RAY_AUTH_TOKEN"] = _TOKEN
    return environment


def _end_processes(processes: set[psutil.Process]) -> None:
    # Ray ends what it has started only when this process ends.
    whole = {child for process in processes for child in (process, *process.children(recursive=True))}
    for process in whole:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(whole), timeout=10)


@contextmanager
def _lean_imports() -> Iterator[None]:
    """Have this process, and the processes that Ray starts, not import what ``ray_path`` says is not needed."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_LEAN_PATH, *([before] if before else [])])
    sys.path.insert(0, _LEAN_PATH)
    try:
        yield
    finally:
        sys.path.remove(_LEAN_PATH)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextmanager
def session(config: Config) -> Iterator[None]:
    """A Ray cluster for as long as the block runs. One that was there before is used, and left running."""
    started = start(config)
    try:
        yield
    finally:
        if started:
            stop()


def launch(configs: Sequence[Config], poll: Callable[[], None]) -> None:
    """Run the configurations one after the other on ``dp x tp`` Ray Train workers.

    Whatever it raises, even ``KeyboardInterrupt``, it first ends the workers of these runs; on somebody else's cluster,
    Ray may take longer to end them. If the runs are asked to stop before a worker has begun, it returns untrained.

    Raises:
        ConfigError: the cluster does not have that many CPUs or GPUs. Ray would wait for them without end.
        WorkerError: a worker failed; the message is its own traceback.
    """
    first = configs[0]
    directories = [RunDirectory(config.directory) for config in configs]
    with session(first):
        import ray.train
        from ray.train.torch import TorchConfig
        from ray.train.v2.api.config import FailureConfig

        if _server:
            _server.renew(first)
        _check_resources(first)
        _forget_deleted_checkpoints(directories[-1])
        trainer = _trainer_class()(
            _worker,
            train_loop_config={"configs": [config.to_json() for config in configs]},
            scaling_config=ray.train.ScalingConfig(
                num_workers=first.parallel.world_size,
                use_gpu=first.run.device == "cuda",
                resources_per_worker=_resources(first),
            ),
            run_config=ray.train.RunConfig(
                name=configs[-1].run.name,
                storage_path=configs[-1].run.storage,
                failure_config=FailureConfig(
                    max_failures=first.run.max_failures,
                    # How often it may wait for slots that the cluster no longer has. Unstated, it waits for ever.
                    controller_failure_limit=START_TIMEOUT // _GROUP_START_SECONDS,
                ),
                callbacks=[_recorder(directories[-1])],
            ),
            torch_config=TorchConfig(backend="gloo" if first.run.device == "cpu" else "cpu:gloo,cuda:nccl"),
        )
        failed: list[BaseException] = []
        fit = threading.Thread(target=_fit, args=(trainer, failed), daemon=True)
        has_begun = _sign_of_life(directories)
        fit.start()
        try:
            wait_for(fit, poll, _patience(has_begun), _stop_before_begin(has_begun, directories))
        except _StoppedBeforeBegin:
            trainer.end()
            return
        except BaseException:
            trainer.end()
            raise
        if failed and _changed_environment:
            _free_slots()
    if failed:
        error = first_error(directories, f"Ray Train failed: {failed[0]}")
        raise error from (None if directories_have_error(directories) else failed[0])


def _recorder(directory: RunDirectory) -> Any:
    """What Ray's controller calls when workers fail: it notes who failed first and why, for the restart to show."""
    from ray.exceptions import RayActorError
    from ray.train import UserCallback

    class Recorder(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            written = directory.first_error()
            by_rank = {rank: getattr(e, "health_check_failure", e) for rank, e in sorted(worker_exceptions.items())}
            # A worker that is gone wrote nothing; what its peers then write is the consequence.
            gone = next((rank for rank, e in by_rank.items() if isinstance(e, RayActorError)), None)
            if written and gone is None:
                failed = {name: written[name] for name in ("rank", "type", "message")}
            else:
                rank = min(by_rank) if gone is None else gone
                said = " ".join(str(by_rank[rank]).split())
                failed = {"rank": rank, "type": type(by_rank[rank]).__name__, "message": said}
            directory.write_restarts([*directory.restarts(), {"time": time.time(), "failed": failed}])

    return Recorder()


def _forget_deleted_checkpoints(directory: RunDirectory) -> None:
    """Drop Ray's own list of a run's checkpoints if it would refuse the run for it; ours decide what a resume reads.

    It does so if one of them is gone, by pruning or by hand, or if it was killed in writing the list.
    """
    snapshot = directory.path / "checkpoint_manager_snapshot.json"
    if not snapshot.is_file():
        return
    try:
        listed = json.loads(snapshot.read_text(encoding="utf-8"))["checkpoint_results"]
        if all((directory.path / each["checkpoint_dir_name"]).exists() for each in listed):
            return
    except (ValueError, KeyError):
        pass
    snapshot.unlink()


def directories_have_error(directories: Sequence[RunDirectory]) -> bool:
    return any(directory.first_error() for directory in directories)


def _sign_of_life(directories: Sequence[RunDirectory]) -> Callable[[], bool]:
    """Return a function that tells whether a worker has begun since now: whether it has written to a log."""

    def last_written() -> dict[Path, int]:
        logs = (log for directory in directories for log in directory.logs.glob("rank-*.log"))
        return {log: log.stat().st_mtime_ns for log in logs}

    before = last_written()
    return lambda: last_written() != before


def _patience(has_begun: Callable[[], bool]) -> Callable[[], None]:
    """A check that raises if no worker has begun by the end of :data:`START_TIMEOUT`: Ray itself waits for ever."""
    since = time.monotonic()

    def check() -> None:
        if time.monotonic() - since >= START_TIMEOUT and not has_begun():
            raise WorkerError(
                f"Ray started no worker within {START_TIMEOUT} s. `ray status` shows what it waits for; its own logs "
                "are under session_latest/logs in its temporary directory."
            )

    return check


class _StoppedBeforeBegin(Exception):
    """The runs were asked to stop before the first worker had begun."""


def _stop_before_begin(has_begun: Callable[[], bool], directories: Sequence[RunDirectory]) -> Callable[[], None]:
    """A check that raises if the runs are asked to stop and there is no worker yet that would notice."""

    def check() -> None:
        if any(directory.stop_file.exists() for directory in directories) and not has_begun():
            raise _StoppedBeforeBegin

    return check


def _trainer_class() -> Any:
    """Ray's ``TorchTrainer``, whose fit can be ended from another thread. Not at the top: Ray is imported late."""
    import ray
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class Trainer(TorchTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._lock, self._ended = threading.Lock(), False
            self._controller: Any = None

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            if not _changed_environment:
                return callbacks
            # This callback frees the slots of a dead controller. On our own cluster it cannot: it asks the dashboard,
            # which is off, and each fit would end by waiting for it. `_free_slots` does this instead.
            return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

        def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
            # As in the class above, but that the controller is kept.
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
            remote = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})
            with self._lock:
                if self._ended:
                    raise RuntimeError("the fit was ended before it began")
                self._controller = remote(TrainController).remote(**kwargs)
            try:
                ray.get(self._controller.run.remote())
                return ray.get(self._controller.get_result.remote())
            finally:
                self._controller = None  # its process ends with the last reference, and an error's traceback has this

        def end(self) -> None:
            """End the fit's processes. Does nothing if there are none, and takes no longer than some seconds."""
            with self._lock:
                self._ended, controller = True, self._controller
            if controller:
                _end_fit(controller)

    return Trainer


def _end_fit(controller: Any) -> None:
    import ray

    if not _changed_environment:
        # A cluster of somebody else. The controller ends its workers and frees their slots, unless it is busy.
        with suppress(ray.exceptions.RayError):
            ray.get(controller.abort.remote(), timeout=_END_SECONDS)
        ray.kill(controller)
        return
    ray.kill(controller)
    ours = [each for each in psutil.Process().children(recursive=True) if _is_of_a_fit(each)]
    _, alive = psutil.wait_procs(ours, timeout=_END_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_END_SECONDS)
    _free_slots()


def _free_slots() -> None:
    """Free what a controller that is gone has reserved, on our own cluster."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    for group, entry in placement_group_table().items():
        if entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _is_of_a_fit(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith(_TITLES)  # Ray writes each actor's class there
    except (psutil.Error, IndexError):
        return False


def _fit(trainer: Any, failed: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # handed to the launching thread
        failed.append(error)


def _worker(given: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train

    from tutorial_lib.trainer import train_all

    configs = [Config.from_json(text) for text in given["configs"]]
    directory = RunDirectory(configs[-1].directory)
    if ray.train.get_context().get_world_rank() == 0 and directory.restarts():
        directory.clear_errors()  # those of the workers that failed before these
    # Ray registers checkpoints under the directory of the run that it was started for, which is the last one.
    train_all(configs, on_checkpoint=_register)


def _register(path: Path, row: dict[str, Any]) -> None:
    import ray.train
    from ray.train import Checkpoint
    from ray.train.v2.api.report_config import CheckpointUploadMode

    ray.train.report(
        row, checkpoint=Checkpoint(str(path.resolve())), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
    )


def _resources(config: Config) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if config.run.device == "cuda" else {"CPU": 1}


def _check_resources(config: Config) -> None:
    import ray

    offered = ray.cluster_resources()
    for kind, each in _resources(config).items():
        needed = each * config.parallel.world_size
        if offered.get(kind, 0) < needed:
            raise ConfigError(
                f"{config.parallel.world_size} workers need {needed:g} {kind}s, and the Ray cluster has "
                f"{offered.get(kind, 0):g}. Write a smaller dp"
                + (", or device='cpu'." if kind == "GPU" else ", or add nodes to the cluster.")
            )


__all__ = ["WorkerError", "launch", "session"]
