"""Communication traffic: every collective of a block of code, with its kind, number of elements and data type.

>>> with count_collectives() as traffic:
...     engine.backward(loss); engine.step()
>>> traffic.tensors().rows(), traffic.tensors().volume()

**Counting.** Collectives count as the program *requests* them on this rank, whatever the backend does: gloo, for
instance, runs a reduce-scatter as an all-reduce followed by a copy, but it still counts as the reduce-scatter that NCCL
would run. Elements are those of the full logical tensor, the Psi of the formulas in :mod:`tutorial_lib.theory.traffic`:

============== ====================================================================
all_reduce     elements of the reduced tensor
all_gather     elements of the gathered output (all ranks' pieces together)
reduce_scatter elements of the input (before it is scattered)
broadcast      elements of the tensor; the same for reduce
gather/scatter elements of all ranks' pieces together
all_to_all     elements of this rank's input
send, recv     elements of the message
============== ====================================================================

**Method.** ``torch.distributed`` sends each collective through PyTorch's dispatcher (operators ``c10d::*`` and
``_c10d_functional::*``), where a :class:`~torch.utils._python_dispatch.TorchDispatchMode` sees the tensors themselves.
``torch.profiler`` sees the same operators, but records no shapes for *lists* of tensors, which all-reduce, broadcast
and all-gather into a list use.

**Bookkeeping.** Losses, norms, overflow flags, pickled objects and barriers use collectives too.
:meth:`Traffic.tensors` leaves these out: integers, raw bytes, and anything up to :data:`BOOKKEEPING_ELEMENTS`
elements. (DeepSpeed broadcasts parameters as raw bytes while it initialises, so only count steps.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

BOOKKEEPING_ELEMENTS = 8
"""Collectives of at most this many elements carry scalars (a loss, a norm, a flag), not model states."""

VOLUME = {
    "all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "reduce": 1, "gather": 1, "scatter": 1,
    "all_to_all": 1, "send": 1, "recv": 0, "barrier": 0,
}  # fmt: skip
"""Elements that a rank sends per logical element: an all-reduce is a reduce-scatter and an all-gather, so it has 2."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One call: its kind, elements of the full logical tensor, data type, number of ranks, and axis."""

    kind: str
    elements: int
    dtype: str
    bytes_per_element: int
    group_size: int
    floating: bool
    axis: str | None = None
    """Axis of the rank grid that the group lies along; None if it lies along none, or if no axes were given."""
    in_backward: bool = False
    """True if autograd was running backward when it was called."""

    @property
    def bytes(self) -> int:
        return self.elements * self.bytes_per_element

    @property
    def volume(self) -> int:
        """Elements that a rank sends, for a large group: see :data:`VOLUME`."""
        return VOLUME[self.kind] * self.elements if self.group_size > 1 else 0

    @property
    def ring_share(self) -> float:
        """Fraction of :attr:`volume` that a rank really sends in a ring of this size."""
        return 1.0 if self.kind in ("send", "recv") else (self.group_size - 1) / self.group_size

    @property
    def is_bookkeeping(self) -> bool:
        return not self.floating or self.elements <= BOOKKEEPING_ELEMENTS


@dataclass(slots=True)
class Traffic:
    """The collectives that one rank took part in, in order."""

    collectives: list[Collective] = field(default_factory=list)

    def tensors(self) -> Traffic:
        """Return only the collectives of model tensors, without bookkeeping."""
        return Traffic([c for c in self.collectives if not c.is_bookkeeping])

    def volume(self) -> int:
        """Return elements as the formulas count them: an all-reduce twice, a gather or scatter once (:data:`VOLUME`).

        A group of one rank sends nothing.
        """
        return sum(c.volume for c in self.collectives)

    def volume_bytes(self) -> int:
        """Return the bytes of :meth:`volume`, by the size of each data type."""
        return sum(c.volume * c.bytes_per_element for c in self.collectives)

    def wire_bytes(self) -> float:
        """Return the bytes that a rank sends if all collectives run as rings: (n - 1) / n of :meth:`volume_bytes`."""
        return sum(c.volume * c.bytes_per_element * c.ring_share for c in self.collectives)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per kind and data type: ``kind, dtype, count, in_backward, elements, bytes``.

        ``in_backward`` is the number of calls from autograd's backward, out of ``count``.
        """
        groups: dict[tuple[str, str], list[Collective]] = {}
        for c in self.collectives:
            groups.setdefault((c.kind, c.dtype), []).append(c)
        return [
            {
                "kind": kind,
                "dtype": dtype,
                "count": len(members),
                "in_backward": sum(c.in_backward for c in members),
                "elements": sum(c.elements for c in members),
                "bytes": sum(c.bytes for c in members),
            }
            for (kind, dtype), members in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return a summary for JSON; ``tensors`` and ``bookkeeping`` hold :meth:`rows`, ``volume`` covers the tensors.

        If axes are known, ``axes`` holds ``volume``, ``volume_bytes``, ``wire_bytes`` and ``tensors`` for each.
        """
        tensors = self.tensors()
        known = dict.fromkeys(c.axis for c in tensors.collectives if c.axis)
        axes = {a: Traffic([c for c in tensors.collectives if c.axis == a])._tensors_to_dict() for a in known}
        return {
            **tensors._tensors_to_dict(),
            "bookkeeping": Traffic([c for c in self.collectives if c.is_bookkeeping]).rows(),
            **({"axes": axes} if axes else {}),
        }

    def _tensors_to_dict(self) -> dict[str, Any]:
        return {
            "volume": self.volume(),
            "volume_bytes": self.volume_bytes(),
            "wire_bytes": self.wire_bytes(),
            "tensors": self.rows(),
        }


@contextlib.contextmanager
def count_collectives(axes: Mapping[str, Sequence[int]] | None = None) -> Iterator[Traffic]:
    """Record every collective that this process starts in the block, in forward and in backward.

    Args:
        axes: world ranks of this rank's group along each axis, by name. Collectives among the same ranks count along
            that axis; if two axes have the same ranks, along the first.

    Yields:
        A :class:`Traffic` that fills while the block runs. The block computes the same results, but more slowly,
        because each operator passes through Python.
    """
    traffic = Traffic()
    with _Recorder(traffic, {tuple(ranks): axis for axis, ranks in reversed(list((axes or {}).items()))}):
        yield traffic


class _Recorder(TorchDispatchMode):
    def __init__(self, traffic: Traffic, axes: Mapping[tuple[int, ...], str]):
        super().__init__()
        self._traffic = traffic
        self._axes = axes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in _NAMESPACES:
            self._record(func._schema, args, kwargs or {})
        elif any(t.__name__ == "DTensor" for t in types):
            # A DTensor communicates inside its operators. Let it unfold them first: operators inside a call that this
            # method makes would not be recorded.
            return NotImplemented
        return func(*args, **(kwargs or {}))

    def _record(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = schema.name.split("::")[1]
        if name in _NOT_COLLECTIVE:
            return
        if name not in _KINDS:
            raise NotImplementedError(
                f"The collective {schema.name} is not known to tutorial_lib.measure.traffic: a count without it "
                "would be wrong. Add it to _OPERATORS there."
            )
        kind = _KINDS[name]
        arguments = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
        group_size, ranks = _group(arguments)
        names = _OUTPUT if name in _LOOK_AT_OUTPUT else _INPUT
        tensors = list(_flatten(next(arguments[n] for n in names if n in arguments)))
        elements = sum(t.numel() for t in tensors) * (group_size if name in _ONE_RANKS_PIECE else 1)
        dtype = tensors[0].dtype if tensors else torch.uint8
        self._traffic.collectives.append(
            Collective(
                kind,
                0 if kind == "barrier" else elements,
                str(dtype).removeprefix("torch."),
                dtype.itemsize,
                group_size,
                dtype.is_floating_point,
                self._axes.get(ranks),
                torch._C._current_graph_task_id() != -1,
            )
        )


_NAMESPACES = frozenset({"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd"})
_NOT_COLLECTIVE = frozenset({"wait_tensor", "_wrap_tensor_autograd", "check_for_nan"})


_INPUT = ("tensors", "tensor", "input", "inputs", "input_tensor", "input_tensors", "self", "shard")
_OUTPUT = ("output_tensors", "output_tensor", "output_lists", "outputs")
_OPERATORS = {
    "all_reduce": (
        "allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_", "all_reduce_coalesced",
        "all_reduce_coalesced_",
    ),
    "all_gather": (
        "allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
        "all_gather_into_tensor", "all_gather_into_tensor_out", "all_gather_into_tensor_coalesced",
    ),
    "reduce_scatter": (
        "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_tensor",
        "reduce_scatter_tensor_out", "reduce_scatter_tensor_coalesced",
    ),
    "broadcast": ("broadcast_", "broadcast"),
    "reduce": ("reduce_",),
    "gather": ("gather_",),
    "scatter": ("scatter_",),
    "all_to_all": ("alltoall_", "alltoall_base_", "all_to_all_single"),
    "send": ("send", "isend"),
    "recv": ("recv_", "recv_any_source_", "irecv"),
    "barrier": ("barrier", "monitored_barrier_"),
}  # fmt: skip
"""Names of PyTorch's operators by kind, without their namespace."""

_KINDS = {operator: kind for kind, operators in _OPERATORS.items() for operator in operators}
_LOOK_AT_OUTPUT = frozenset(
    {"allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_", "scatter_"}
)
"""Operators whose size follows from their output: gathers, and a scatter, whose input only one rank has."""

_ONE_RANKS_PIECE = frozenset(
    {"all_gather_into_tensor", "all_gather_into_tensor_out", "all_gather_into_tensor_coalesced", "gather_", "scatter_"}
)
"""Operators whose argument is one rank's piece of the full tensor."""


def _flatten(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for item in value:
            yield from _flatten(item)


def _group(arguments: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Return the number of ranks that take part, and the ranks in ascending order."""
    group = dist.ProcessGroup.unbox(arguments["process_group"]) if "process_group" in arguments else None
    named = arguments["group_name"] if group is None else group.group_name
    resolve: Any = dist.distributed_c10d._resolve_process_group
    group = resolve(named) if isinstance(named, str) else named
    ranks = tuple(sorted(dist.get_process_group_ranks(group)))
    return int(arguments.get("group_size", len(ranks))), ranks
