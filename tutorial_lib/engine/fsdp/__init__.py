"""PyTorch's own parallelism behind the engine protocol: FSDP2, DDP as its reference, and DTensor tensor parallelism.

Each part has its own module: :mod:`.engine` (the protocol), :mod:`.sharding` (what each rank holds, and when it is
gathered), :mod:`.tensor_parallel` (which layers are split, and how), :mod:`.weights` (a model that no rank ever holds
in full) and :mod:`.dcp` (checkpoints, with a file per rank).
"""

from tutorial_lib.engine.fsdp.engine import FSDPEngine

__all__ = ["FSDPEngine"]
