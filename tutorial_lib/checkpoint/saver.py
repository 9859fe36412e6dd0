"""Save of one checkpoint: each rank hands its states to its writer, and rank 0 publishes the complete checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager

from tutorial_lib.checkpoint.directory import (
    directory_of,
    finish_deletions,
    partial_of,
    publish,
)
from tutorial_lib.checkpoint.manifest import FORMAT, MANIFEST, CheckpointError, file_entry, sync, wrong_size
from tutorial_lib.checkpoint.rank_writer import MakeWriter, Writer
from tutorial_lib.config import Config
from tutorial_lib.models.side_files import SideFiles
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_objects, barrier, broadcast_object
from tutorial_lib.mpu.random_states import capture_random_states
from tutorial_lib.records import RunDirectory, write_atomically


@dataclass(frozen=True, slots=True)
class TrainingState:
    """State of a run besides the engine's own: everything else that a resume needs.

    Attributes:
        step: optimizer steps done.
        loader: this rank's data position, from the loader.
        scheduler: state of the learning-rate schedule.
        record: the trainer's own notes (JSON).
        identity: identity of model, tokenizer and data, see :mod:`tutorial_lib.checkpoint.compatibility`.
        reshaped_from: the shape in which the run was saved, if it resumed in a different one.
    """

    step: int
    loader: dict[str, Any]
    scheduler: dict[str, Any]
    record: dict[str, Any]
    identity: dict[str, Any] = field(default_factory=dict)
    reshaped_from: dict[str, Any] | None = None


def save(
    run: RunDirectory,
    engine: Any,
    config: Config,
    topology: Topology,
    state: TrainingState,
    side_files: SideFiles | None,
    stager: DefaultStager | None = None,
    make_writer: MakeWriter = Writer,
) -> Save:
    """Start writing a checkpoint; :meth:`Save.finish` makes it visible. Collective.

    Args:
        run: the run's directory, on storage that every rank sees.
        engine: anything with ``save(directory, writer)``, ``module`` and ``device``.
        config: settings of the run, saved so that a resume can compare them.
        topology: this rank's place in the grid.
        state: the rest of the run's state.
        side_files: saved along with the model's configuration, for exports; None except on rank 0.
        stager: from :func:`tutorial_lib.checkpoint.rank_writer.make_stager`. Training may then continue as soon as
            this returns, because the files are written from a snapshot. Without a stager, all files are written when
            this returns.
        make_writer: makes the writer of this rank's files.
    """
    began = time.perf_counter()
    final = directory_of(run, state.step)
    partial = partial_of(final)
    if topology.rank == 0:
        finish_deletions()  # this save may need their space
        partial.mkdir(parents=True)
    partial = broadcast_object(partial)  # rank 0's directory, which exists before the others learn its name
    writer = make_writer(partial, stager)
    engine.save(partial / "engine", writer)
    own = {"loader": state.loader, "random": capture_random_states(engine.device)}
    writer.save(own, partial / f"rank-{topology.rank:03d}.pt")
    if topology.rank == 0:
        assert side_files is not None
        trainer = {
            "format": FORMAT,
            "step": state.step,
            "scheduler": state.scheduler,
            "record": state.record,
            # A checkpoint does not record its own location: its run may be moved.
            "config": {name: value for name, value in config.flat().items() if name != "storage"},
            "world_size": topology.world_size,
            "identity": state.identity,
            "written": {"host": socket.gethostname(), "time": datetime.now(UTC).isoformat(timespec="seconds")},
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
            },
        }
        text = json.dumps(trainer, indent=2)
        writer.submit(_write_description, writer, partial, text, engine.module.config, side_files)
    return Save(state.step, partial, final, topology, writer, time.perf_counter() - began)


def _write_description(writer: Writer, partial: Path, trainer: str, config: Any, side_files: SideFiles) -> None:
    side_files.save(partial / "model", config)
    writer.add_files(partial / "model")
    with writer.file_system.create_stream(partial / "trainer.json", "wb") as stream:
        stream.write(trainer.encode())


@dataclass(slots=True)
class Save:
    """A checkpoint that is being written under a temporary name.

    Attributes:
        step: optimizer steps done.
        seconds: time that training has spent waiting for it.
    """

    step: int
    _partial: Path
    _final: Path
    _topology: Topology
    _writer: Writer
    seconds: float

    def is_written(self) -> bool:
        """Return whether this rank's files are complete. If writing failed, raise this rank's own error."""
        return self._writer.is_done()

    def finish(self) -> dict[str, Any]:
        """Wait for every rank's files, then make the checkpoint visible. Collective.

        Call it on the training thread, between two steps.

        Returns:
            On every rank the ``step``, the ``stall_seconds`` of training, the ``write_seconds`` until the last file was
            on the disk (both from the slowest rank), and the ``bytes`` of all files. Only rank 0 counts files that the
            writers did not write, such as DeepSpeed's scripts.

        Raises:
            CheckpointError: rank 0 does not see some rank's files, because the storage is not shared; or their size
                has changed since they were written.
            OSError: this rank's files could not be written.
        """
        began = time.perf_counter()
        write_seconds = self._writer.wait()
        shares = all_gather_objects((self._writer.files, write_seconds))
        files = {name: entry for share, _ in shares for name, entry in share.items()}
        if self._topology.rank == 0:
            self._publish(files)
        barrier()
        self.seconds += time.perf_counter() - began
        return {
            "step": self.step,
            "stall_seconds": max(all_gather_objects(self.seconds)),
            "write_seconds": max(seconds for _, seconds in shares),
            "bytes": sum(entry["bytes"] for entry in files.values()),
        }

    def _publish(self, files: dict[str, dict[str, Any]]) -> None:
        for path in self._partial.rglob("*"):
            name = str(path.relative_to(self._partial))
            if path.is_dir() or name not in files:
                sync(path)
            if path.is_file() and name not in files:  # not written by the writer: DeepSpeed saves its scripts itself
                files[name] = file_entry(path)
        missing = sorted(name for name in files if not (self._partial / name).is_file())
        if missing:
            raise CheckpointError(
                f"{missing[0]} was written, but rank 0 does not see it in {self._partial}. The storage must be visible "
                "to every node, such as a network file system: choose another --storage."
            )
        if wrong := next(filter(None, (wrong_size(self._partial / name, files[name]) for name in sorted(files))), None):
            raise CheckpointError(
                f"{wrong} Another process has changed it since. This save stays invisible; earlier checkpoints are "
                "untouched. End the process that writes there, then run the same command again."
            )
        write_atomically(self._partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        sync(self._partial / MANIFEST)
        sync(self._partial)
        publish(self._partial, self._final)

    def abandon(self) -> None:
        """Abandon the save, which stays invisible, and return once this rank has stopped writing."""
        self._writer.close()
