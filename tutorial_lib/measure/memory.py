"""Memory of a process: the exact size of its tensors, exact allocator peaks, and the operating system's view.

There are three instruments, from the most exact to the broadest:

- :class:`StateBytes` adds up the storages behind given tensors: exact, but only for those.
- :func:`count_allocations` follows PyTorch's allocator through a block: the exact peak of everything it handed out,
  including activations and a kernel's temporaries.
- :func:`peak_memory` is the peak of a GPU's allocator or, on a CPU, of the entire process as the operating system sees
  it, including libraries and caches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind the tensors, each counted once, as :class:`StateBytes` counts them."""
    return sum(_storages(tensors).values())


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of a rank's model states, split as the ZeRO paper splits them."""

    parameters: int
    gradients: int
    optimizer: int
    by_device: Mapping[str, int] = field(default_factory=dict)
    """The same bytes by type of device: offloaded states are under ``cpu``."""

    @classmethod
    def of(cls, states: Mapping[str, Iterable[torch.Tensor]]) -> StateBytes:
        """Add up tensors named ``parameters``, ``gradients`` and ``optimizer``.

        A storage that several parts share (such as a gradient in the optimizer's flat buffer) counts once, for the
        first of parameters, gradients, optimizer that contains it.

        Raises:
            ValueError: a part has another name, and would not be counted.
        """
        parts = ("parameters", "gradients", "optimizer")
        if unknown := set(states) - set(parts):
            raise ValueError(f"{sorted(unknown)} are not parts of the model states. Use only: {', '.join(parts)}.")
        counted: dict[tuple[str, int], int] = {}
        totals, by_device = dict.fromkeys(parts, 0), dict[str, int]()
        for part in parts:
            for storage, size in _storages(states.get(part, ())).items():
                if storage not in counted:
                    counted[storage] = size
                    totals[part] += size
                    by_device[storage[0]] = by_device.get(storage[0], 0) + size
        return cls(**totals, by_device=by_device)

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        """Return all sizes in bytes, with ``total`` and ``by_device``."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "total": self.total,
            "by_device": dict(self.by_device),
        }


@dataclass(slots=True)
class Allocations:
    """Activity of PyTorch's allocator in a block, per type of device, relative to the start of the block."""

    peak: dict[str, int] = field(default_factory=dict)
    """Highest number of bytes held at one time."""
    remaining: dict[str, int] = field(default_factory=dict)
    """Bytes still held at the end."""
    at_marks: list[dict[str, int]] = field(default_factory=list)
    """Bytes held at each call of :meth:`mark`."""

    def mark(self) -> None:
        """Mark this moment inside the block, in the thread that entered it."""
        with torch.profiler.record_function(_MARK):
            pass


_MARK = "tutorial_lib.measure.memory: mark"


@contextlib.contextmanager
def count_allocations() -> Iterator[Allocations]:
    """Follow every allocation of the block, to find exact peaks, even those that a sampler would miss.

    This counts the memory that the block itself allocates, in this thread and in backward, including temporaries inside
    kernels. Memory from before the block does not count, except that freeing it lowers the numbers on a GPU. The
    yielded object is filled at the end of the block. Every operator is recorded, so use it for building a model or for
    single steps, not for a long run.
    """
    allocations = Allocations()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        yield allocations
    # The profiler's tables group allocations by operator and lose their order; its raw events keep it.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() in ("[memory]", _MARK)]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == _MARK:
            allocations.at_marks.append(dict(allocations.remaining))
            continue
        device = event.device_type().name.lower()
        now = allocations.remaining.get(device, 0) + event.nbytes()
        allocations.remaining[device] = now
        allocations.peak[device] = max(allocations.peak.get(device, 0), now)


def reset_peak_memory(device: torch.device) -> None:
    """Reset :func:`peak_memory` to the memory that is held now, for another run in the same process."""
    if device.type == "cuda":
        if torch.cuda.is_initialized():  # before that there is nothing to reset, and torch refuses
            torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # the system may forbid it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes since :func:`reset_peak_memory`, of a GPU's allocator or, on a CPU, of the process's RSS.

    Linux keeps counters per thread and adds them up in batches, so RSS is only accurate to a few hundred KiB: use
    :func:`count_allocations` for models smaller than that.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _storages(tensors: Iterable[torch.Tensor]) -> dict[tuple[str, int], int]:
    """Return the bytes of each storage, identified by its device's type and its address inside PyTorch.

    Tied parameters and views cost nothing extra; a slice counts as the full buffer that it keeps alive. A parameter
    that ZeRO-3 or FSDP2 has released has no storage and counts as 0, as does a tensor on the meta device. A DTensor
    counts as this rank's local part.
    """
    # The list keeps temporary tensors alive: a freed address would soon be reused for another storage.
    alive = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return {
        (tensor.device.type, tensor.untyped_storage()._cdata): tensor.untyped_storage().nbytes()
        for tensor in alive
        if tensor.device.type != "meta"
    }
