"""Placement of Ray Train's workers: each tensor-parallel group on one node, and as many groups as the nodes hold.

Ray Train reserves a bundle of resources for each worker, and packs the bundles onto few nodes if it can. That may split
a tensor-parallel group over two nodes, and every layer would then wait for the network. Here each bundle holds a
complete group, and Ray never splits a bundle::

    dp=2, tp=2        node 1: bundle 0 = ranks 0 and 1        node 2: bundle 1 = ranks 2 and 3

Ray Train waits forever for resources that the cluster does not have. Here the wait is limited.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import ScalingConfig
from ray.util.placement_group import PlacementGroup

from tutorial_lib.launch.ray.capacity import (
    Demand,
    ResourcesMissing,
    StoppedWaiting,
    describe_missing,
    read_nodes,
)
from tutorial_lib.records import RunDirectory

POLL_SECONDS = 0.5
"""Seconds between checks of the cluster while a run waits for room."""


class BoundedScaling(ScalingPolicy):
    """Scaling policy for Ray Train: wait for room up to a limit, then start with as many ranks as fit.

    Args:
        scaling: Ray Train's ``ScalingConfig``; it asks an autoscaler for the largest number of workers.
        demand: resources that the run needs.
        timeout: seconds to wait for room.
        settle: seconds to wait for the full size if there is already room for a smaller one.
        every: seconds between checks for room for more ranks, while the run trains on fewer.
        directory: directory of the run. The run grows when it has just saved, so that no step is trained twice.
    """

    def __init__(
        self, scaling: Any, demand: Demand, *, timeout: float, settle: float, every: float, directory: Path
    ) -> None:
        super().__init__(scaling)
        self.demand, self.timeout, self.settle, self.every = demand, timeout, settle, every
        self.run = RunDirectory(directory)
        self._waits_since: float | None = None
        self._looked = 0.0
        self._saved_at: str | None = None
        """Name of the newest checkpoint when room for more ranks appeared; None if there is no such room."""

    def _get_num_workers_for_resource_request(self) -> int:
        return self.demand.sizes[-1] * self.demand.tp

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Decide how many workers to start, or whether to wait.

        Raises:
            ResourcesMissing: the wait has reached its limit.
            StoppedWaiting: the run has been asked to stop, and no worker is there to notice it.
        """
        self._maybe_send_resource_request()
        now = time.monotonic()
        self._waits_since = now if self._waits_since is None else self._waits_since
        waited = now - self._waits_since
        nodes = read_nodes()
        size = self.demand.largest_size(sum(self.demand.groups_on(node.free) for node in nodes))
        if size and (size == self.demand.sizes[-1] or waited >= min(self.settle, self.timeout)):
            return self._start(size)
        if waited >= self.timeout:
            raise ResourcesMissing(describe_missing(self.demand, nodes, waited))
        if self.run.stop_file.exists():
            raise StoppedWaiting("The run was asked to stop while it waited for room on the Ray cluster.")
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Decide to restart with more workers if there is room for them and the run has just saved."""
        self._maybe_send_resource_request()
        if self._waits_since is not None:
            self._waits_since, self._looked = None, time.monotonic()
        size = len(worker_group_state.workers) // self.demand.tp
        if size == self.demand.sizes[-1]:
            return NoopDecision()
        if self._saved_at is None:
            if time.monotonic() - self._looked >= self.every:
                self._looked = time.monotonic()
                if self._possible_size(worker_group_state.workers) > size:
                    self._saved_at = self._newest_checkpoint()
            return NoopDecision()
        if self._newest_checkpoint() == self._saved_at:
            return NoopDecision()
        self._saved_at = None
        larger = self._possible_size(worker_group_state.workers)
        return self._start(larger) if larger > size else NoopDecision()

    def _possible_size(self, workers: list[Any]) -> int:
        """Return the size that the run could have with all free resources and those that it already holds."""
        held = Counter(worker.metadata.node_id for worker in workers)
        groups = 0
        for node in read_nodes():
            own = {kind: each * held[node.id] for kind, each in self.demand.per_worker.items()}
            groups += self.demand.groups_on({kind: node.free.get(kind, 0) + own[kind] for kind in own})
        return self.demand.largest_size(groups) or 0

    def _newest_checkpoint(self) -> str:
        return max((path.name for path in self.run.checkpoints.glob("step-*")), default="")

    def _start(self, size: int) -> ResizeDecision:
        return ResizeDecision(
            num_workers=size * self.demand.tp,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )


class WorkersInGroups(WorkerGroup):
    """Worker group in which each tensor-parallel group has one bundle, and therefore one node."""

    def _tp(self) -> int:
        config: dict[str, Any] = self._train_run_context.train_loop_config or {}
        return int(config["tp"])

    def _create_placement_group(self, scaling_config: ScalingConfig, worker_group_context: Any) -> Any:
        tp = self._tp()
        per_group = {kind: each * tp for kind, each in worker_group_context.resources_per_worker.items()}
        bundles = replace(
            worker_group_context,
            resources_per_worker=per_group,
            num_workers=worker_group_context.num_workers // tp,
        )
        return super()._create_placement_group(scaling_config, bundles)

    def _create_workers(self, num_workers: int, placement_group: PlacementGroup, *args: Any, **kwargs: Any) -> Any:
        kwargs["placement_group_bundle_indices"] = [worker // self._tp() for worker in range(num_workers)]
        return super()._create_workers(num_workers, placement_group, *args, **kwargs)


class TrainControllerOfGroups(TrainController):
    """Ray Train's controller, with :class:`WorkersInGroups`."""

    worker_group_cls = WorkersInGroups

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        if self._worker_group:
            self._shutdown_worker_group()  # the rest of a failed group would occupy the slots that the next one needs
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)

    async def _step(self) -> Any:
        result = await super()._step()
        if result.next_state is self.get_state():
            # The run waits for room. Ray Train would ask again at once, and could not even be stopped in the meantime.
            await asyncio.sleep(POLL_SECONDS)
        return result
