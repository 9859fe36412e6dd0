"""Checkpoints: saved by every rank, visible only when whole, verified before anything is unpickled.

A checkpoint is the directory ``checkpoints/step-NNNNNNNN`` of a run::

    engine/            what the engine writes: each rank its own shard
    rank-NNN.pt        this rank's random-number states and its position in the data
    model/             configuration and tokenizer, so that an export needs nothing else
    trainer.json       step, learning-rate schedule, settings, versions
    manifest.json      every file with its size and SHA-256; written last

It is written under a name that nobody reads, if asked while training goes on (``async_save``), and renamed when the
manifest is complete, so an interrupted save leaves
the previous checkpoint the newest one. The engine's files are pickles, FSDP2's ``.metadata`` among them: unpickling
runs code, so only load checkpoints that you or your job wrote. The manifest protects against damage, not against
forgery.
"""

from tutorial_lib.checkpoint.continuing import check_continues, check_same_run, check_storage
from tutorial_lib.checkpoint.exporting import export
from tutorial_lib.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    agreed,
    directory_of,
    latest,
    read_trainer_state,
    verify,
)
from tutorial_lib.checkpoint.saving import Progress, Save, load, save
from tutorial_lib.checkpoint.whole import LAYOUT, MOMENTS, Whole, open_whole
from tutorial_lib.checkpoint.writing import Writer, make_stager

__all__ = [
    "LAYOUT",
    "MANIFEST",
    "MOMENTS",
    "CheckpointError",
    "Progress",
    "Save",
    "Whole",
    "Writer",
    "agreed",
    "check_continues",
    "check_same_run",
    "check_storage",
    "directory_of",
    "export",
    "latest",
    "load",
    "make_stager",
    "open_whole",
    "read_trainer_state",
    "save",
    "verify",
]
