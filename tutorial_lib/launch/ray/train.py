"""Ray Train launcher: run the ranks as Ray Train's workers, on this machine or on a Ray cluster.

Ray Train places the workers and sets up the process group; the training function is the same as for the other
launchers. Each worker writes its own files directly to the run's storage, and ``ray.train.report`` only registers the
finished checkpoint (:mod:`tutorial_lib.launch.ray.report`): Ray then knows the newest one without copying any file.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tutorial_lib.config import Config
from tutorial_lib.launch.errors import WorkerError, first_error, next_start
from tutorial_lib.launch.ray.capacity import Demand, ResourcesMissing, StoppedWaiting, check_capacity, read_nodes
from tutorial_lib.launch.ray.cluster import has_dashboard, is_own, renew_server, session
from tutorial_lib.launch.ray.storage import check_shared, forget_deleted_checkpoints
from tutorial_lib.launch.ray.waiting import StoppedBeforeStart, limit_wait, stop_before_start, watch_for_start
from tutorial_lib.launch.runs import Interrupted
from tutorial_lib.launch.watch import wait_for
from tutorial_lib.records import RunDirectory, lost_another_rank

__all__ = ["WORKER", "launch", "session"]

WORKER = "tutorial_lib.launch.ray.worker"

START_ATTEMPTS = 10
"""Number of times that workers are restarted if they fail to start."""

SETTLE_SECONDS = 5.0
"""Seconds that a run waits for the nodes of all its ranks before it starts with fewer, if ``min_dp`` allows that."""

GROW_SECONDS = 60.0
"""Seconds between checks for room for the missing ranks."""

_END_SECONDS = 3
"""Seconds for the workers of an interrupted fit to end before they are killed."""

_TITLES = ("ray::TrainController", "ray::RayTrainWorker", "ray::SynchronizationActor", "ray::DatasetManager")
"""Prefixes of the titles of a fit's processes."""


def launch(configs: Sequence[Config], poll: Callable[[], None], worker: str = WORKER) -> None:
    """Run the configurations one after the other on ``dp x tp`` Ray Train workers, or fewer if ``min_dp`` allows it.

    Before it raises anything, even ``KeyboardInterrupt``, it ends the workers of these runs; on a cluster that it
    did not start, Ray may take longer to end them. If the runs are asked to stop before a worker has started, it
    returns without training.

    Args:
        configs: what to run; all need the same number of ranks and the same device.
        poll: called a few times per second while the workers run.
        worker: module that every worker runs, with a ``main(given)`` as in
            :mod:`tutorial_lib.launch.ray.worker`.

    Raises:
        ConfigError: the cluster has too few CPUs or GPUs, no node can hold a tensor-parallel group, a node does not see
            the storage, or a rank refused the configuration.
        WorkerError: a worker failed, and the message is its own traceback; or the cluster had no room for
            ``resource_timeout`` seconds, and the message lists its resources.
        Interrupted: the runs were asked to stop while they waited for room to restart.
    """
    first = configs[0]
    demand = Demand.from_config(first)
    directories = [RunDirectory(config.directory) for config in configs]
    with session(first):
        import ray.train
        from ray.train.torch import TorchConfig
        from ray.train.v2.api.config import FailureConfig

        renew_server(first.run, first.parallel)
        _check_cluster(demand, directories[-1].path)
        forget_deleted_checkpoints(directories[-1])
        trainer = _trainer_class(first, demand)(
            _run_worker,
            train_loop_config={
                "worker": worker,
                "configs": [config.to_json() for config in configs],
                "tp": first.parallel.tp,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=first.parallel.world_size,
                use_gpu=first.run.device == "cuda",
                resources_per_worker=dict(demand.per_worker),
            ),
            run_config=ray.train.RunConfig(
                name=configs[-1].run.name,
                storage_path=configs[-1].run.storage,
                failure_config=FailureConfig(
                    max_failures=first.run.max_failures, controller_failure_limit=START_ATTEMPTS
                ),
                callbacks=[_recorder(directories[-1])],
            ),
            torch_config=TorchConfig(backend="gloo" if first.run.device == "cpu" else "cpu:gloo,cuda:nccl"),
        )
        failed: list[BaseException] = []
        fit = threading.Thread(target=_fit, args=(trainer, failed), daemon=True)
        has_begun = watch_for_start(directories)
        fit.start()
        try:
            wait_for(
                fit, poll, limit_wait(has_begun, first.run.resource_timeout), stop_before_start(has_begun, directories)
            )
        except StoppedBeforeStart:
            trainer.end()
            return
        except BaseException:
            trainer.end()
            raise
        if failed and is_own():
            _free_slots()
    if failed:
        if isinstance(_controller_failure(failed[0]), StoppedWaiting) and not has_begun():
            return
        have_error = any(directory.first_error() for directory in directories)
        raise _error(failed[0], directories) from (None if have_error else failed[0])


def _controller_failure(failed: BaseException) -> Exception | None:
    """Return the error of Ray Train's controller, or None if a worker's error ended the fit."""
    return getattr(failed, "controller_failure", None)


def _error(failed: BaseException, directories: Sequence[RunDirectory]) -> BaseException:
    """Return the error of a failed fit: a lack of room, or the error of the rank that failed first."""
    missing = _controller_failure(failed)
    if not isinstance(missing, ResourcesMissing):
        return _lost_rank(failed, directories) or first_error(directories, f"Ray Train failed: {failed}")
    before = [restart["failed"] for directory in directories for restart in directory.restarts()]
    why = f"\nIt had to restart because rank {before[-1]['rank']} failed: {before[-1]['message']}" if before else ""
    message = f"{missing}{why}\n{next_start(directories)}"
    return Interrupted(message, []) if isinstance(missing, StoppedWaiting) else WorkerError(message)


def _lost_rank(failed: BaseException, directories: Sequence[RunDirectory]) -> WorkerError | None:
    """Return an error that names the rank that was killed or lost, or None if a rank has an error of its own."""
    directory = next((each for each in directories if each.errors()), directories[-1])
    written, known = directory.first_error(), getattr(failed, "worker_failures", {})
    if not known or (written and not lost_another_rank(written)):
        return None
    first = _first_failure(written, known)
    rank = f"Rank {first['rank']} of run {directory.path.name!r}"
    cause = f"{first['type']}: {first['message']}"
    if _is_gone(known.get(first["rank"])):
        why = "it was killed, perhaps for lack of memory, or its node was lost."
        return WorkerError(f"{rank} left no error: {why} {next_start(directories)}\n{cause}")
    return WorkerError(f"{rank} failed with {cause}\n{next_start(directories)}") if written else None


def _check_cluster(demand: Demand, directory: Path) -> None:
    """Refuse storage that the nodes do not share, and a cluster without room for the run, unless it can grow."""
    from ray._private.state import state

    nodes = read_nodes()
    if not state.get_max_resources_from_cluster_config():  # otherwise an autoscaler may add nodes
        check_capacity(demand, nodes)
    check_shared(directory, [node for node in nodes if demand.groups_on(node.total)])


def _recorder(directory: RunDirectory) -> Any:
    """Return a callback for Ray's controller that records, for each restart, which worker failed first and why."""
    from ray.train import UserCallback

    class Recorder(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            failed = _first_failure(directory.first_error(), worker_exceptions)
            directory.write_restarts([*directory.restarts(), {"time": time.time(), "failed": failed}])

    return Recorder()


def _first_failure(written: dict[str, Any] | None, worker_exceptions: dict[int, Exception]) -> dict[str, Any]:
    """Return the rank, type and message of the failure that caused the others.

    Args:
        written: the first error that a worker wrote, if any did.
        worker_exceptions: the exceptions that Ray has received so far, by rank.
    """
    by_rank = dict(sorted(worker_exceptions.items()))
    # A worker that died wrote nothing; the errors of its peers are consequences.
    gone = next((rank for rank, e in by_rank.items() if _is_gone(e)), None)
    if written is None or gone is not None:
        rank = min(by_rank) if gone is None else gone
        known = getattr(by_rank[rank], "health_check_failure", by_rank[rank])
        return {"rank": rank, "type": type(known).__name__, "message": " ".join(str(known).split())}
    message = written["message"]
    if lost_another_rank(written):  # this error may reach Ray before Ray notices which worker or node is gone
        message = f"it lost another rank, which was killed or whose node was lost, and which left no error. {message}"
    return {"rank": written["rank"], "type": written["type"], "message": message}


def _is_gone(error: Exception | None) -> bool:
    """Return whether Ray's error says that the worker's process or node is gone."""
    from ray.exceptions import RayActorError

    return isinstance(getattr(error, "health_check_failure", error), RayActorError)


def _trainer_class(config: Config, demand: Demand) -> Any:
    """Return Ray's ``TorchTrainer`` with the run's placement and waiting, and a fit that another thread can end.

    The class is defined within a function because Ray is imported late.
    """
    import ray
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from tutorial_lib.launch.ray.placement import BoundedScaling, TrainControllerOfGroups

    class Trainer(TorchTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._lock, self._ended = threading.Lock(), False
            self._controller: Any = None

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            left_out: tuple[type, ...] = (DatasetsCallback,)  # starts a process for Ray's datasets: we use none
            if not has_dashboard():
                # It frees the slots of a dead controller. Without a dashboard to ask, it frees none, and each fit would
                # wait for it at the end. On our own cluster, `_free_slots` frees them.
                left_out += (PlacementGroupCleanerCallback,)
            return [each for each in callbacks if not isinstance(each, left_out)]

        def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
            # As in the parent class, except that we keep the controller, and use our own placement and waiting.
            kwargs["scaling_policy"] = BoundedScaling(
                self.scaling_config,
                demand,
                timeout=config.run.resource_timeout,
                settle=SETTLE_SECONDS,
                every=GROW_SECONDS,
                directory=config.directory,
            )
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
            remote = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})
            with self._lock:
                if self._ended:
                    raise RuntimeError("the fit was ended before it started")
                self._controller = remote(TrainControllerOfGroups).remote(**kwargs)
            try:
                ray.get(self._controller.run.remote())
                return ray.get(self._controller.get_result.remote())
            finally:
                self._controller = None  # its process ends with the last reference, and an error's traceback holds self

        def end(self) -> None:
            """End the fit's processes, if there are any, within a few seconds."""
            with self._lock:
                self._ended, controller = True, self._controller
            if controller:
                _end_fit(controller)

    return Trainer


def _end_fit(controller: Any) -> None:
    import ray

    if not is_own():
        # On a cluster that we did not start, the controller ends its workers and frees their slots, unless it is busy.
        with suppress(ray.exceptions.RayError):
            ray.get(controller.abort.remote(), timeout=_END_SECONDS)
        ray.kill(controller)
        return
    ray.kill(controller)
    ours = [each for each in psutil.Process().children(recursive=True) if _belongs_to_fit(each)]
    _, alive = psutil.wait_procs(ours, timeout=_END_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_END_SECONDS)
    _free_slots()


def _free_slots() -> None:
    """Free the slots that a dead controller had reserved on our own cluster."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    for group, entry in placement_group_table().items():
        if entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _belongs_to_fit(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith(_TITLES)  # Ray writes each actor's class there
    except (psutil.Error, IndexError):
        return False


def _fit(trainer: Any, failed: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # handed to the launching thread
        failed.append(error)


def _run_worker(given: dict[str, Any]) -> None:
    """Call the worker's ``main`` in a process of Ray; only this process imports the worker."""
    importlib.import_module(given["worker"]).main(given)
