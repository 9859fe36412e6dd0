"""Checkpoints: saved by every rank, visible only when complete, verified before anything is unpickled.

A checkpoint is the directory ``checkpoints/step-NNNNNNNN`` of a run::

    engine/            the engine's files: each rank writes its own shard
    rank-NNN.pt        each rank's random-number states and its position in the data
    model/             configuration and tokenizer, so that an export needs nothing else
    trainer.json       step, learning-rate schedule, settings, versions
    manifest.json      every file with its size and SHA-256; written last

The ranks write a checkpoint under a temporary name that no reader looks for; with ``async_save``, training continues in
the meantime. Once the manifest is complete, the directory gets its final name, so after an interrupted save the
previous checkpoint is still the newest. A resume reads every byte before it loads anything, and falls back to the
newest intact checkpoint if newer ones are damaged.

The engine's files are pickles, and so is FSDP2's ``.metadata``. Unpickling runs code, so only load checkpoints that you
or your job wrote. The manifest protects against damage, not against forgery.

The main functions are :func:`save`, :func:`load`, :func:`verify`, :func:`export` and :func:`reshape`. In a training
loop, :class:`CheckpointManager` decides when to save and what to load; ``saver`` directs one save, and ``rank_writer``
writes a rank's files. To rewrite a checkpoint in a different shape, :func:`tutorial_lib.launch.reshape` starts ranks of
that shape. Each on-disk format has its own module (:mod:`~tutorial_lib.checkpoint.formats`).

All ranks must call the functions whose docstrings say "Collective", in the same order.
"""

from tutorial_lib.checkpoint.directory import directory_of, latest
from tutorial_lib.checkpoint.exporter import export
from tutorial_lib.checkpoint.formats import MOMENTS, FullTensors, open_full
from tutorial_lib.checkpoint.loader import load
from tutorial_lib.checkpoint.manager import CheckpointManager
from tutorial_lib.checkpoint.manifest import CheckpointError, verify
from tutorial_lib.checkpoint.reshaper import reshape
from tutorial_lib.checkpoint.saver import save

__all__ = [
    "MOMENTS",
    "CheckpointError",
    "CheckpointManager",
    "FullTensors",
    "directory_of",
    "export",
    "latest",
    "load",
    "open_full",
    "reshape",
    "save",
    "verify",
]
