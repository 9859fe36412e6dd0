"""Stop requests: a signal to any rank, the stop file, or the end of a time slot. All ranks stop together."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_ints
from tutorial_lib.records import RunDirectory

STOP_AFTER, REQUEST = "stop_after", "request"
"""Values of ``stopped_by`` in ``result.json``; for a signal it is the signal's name, such as ``SIGTERM``."""

_REQUESTED = 1000
"""Number for a request through the stop file; larger than any signal number."""


class StopRequests:
    """Requests for one start of a run to stop.

    Args:
        run: the run, which may have a stop file.
        topology: this rank's place in the grid; rank 0 looks for the file.
        stop_after: the last step of the time slot, or None.
        stop_signalled: function that returns the number of the signal that asked this process to stop, or 0.

    Attributes:
        stopped_by: reason why the run stopped, as in ``result.json``, or None.
    """

    def __init__(
        self, run: RunDirectory, topology: Topology, stop_after: int | None, stop_signalled: Callable[[], int]
    ) -> None:
        self._run, self._topology, self._stop_after = run, topology, stop_after
        self._stop_signalled = stop_signalled
        self.stopped_by: str | None = None

    def may_be_killed_soon(self) -> bool:
        """Return whether a stop was requested from outside, so that the run may be killed soon."""
        return self.stopped_by not in (None, STOP_AFTER)

    def time_slot_has_ended(self, step: int) -> bool:
        """Return whether the time slot ends with this step, or ended before it, and set :attr:`stopped_by`."""
        is_over = self._stop_after is not None and step >= self._stop_after
        self.stopped_by = STOP_AFTER if is_over else None
        return is_over

    def agree(self, step: int) -> bool:
        """Return whether training stops after this step, with the same answer on every rank. Collective."""
        is_over = self.time_slot_has_ended(step)
        stop = max(own for (own,) in all_gather_ints([self._own_request()]))
        if stop:
            self.stopped_by = REQUEST if stop == _REQUESTED else signal.Signals(stop).name
        return is_over or bool(stop)

    def _own_request(self) -> int:
        if self._topology.rank == 0 and self._run.stop_file.exists():
            return _REQUESTED
        return self._stop_signalled()
