"""PyTorch's own parallelism behind the engine protocol: FSDP2, DDP as its reference row, DTensor tensor parallelism.

One page each: :mod:`engine` (the protocol), :mod:`sharding` (who holds what, and when it is gathered),
:mod:`tensor_parallel` (which layers are split, and how), :mod:`weights` (a model that no rank ever holds whole),
:mod:`saving` (checkpoints, each rank its own file).
"""

from tutorial_lib.engine.fsdp.engine import FSDPEngine

__all__ = ["FSDPEngine"]
