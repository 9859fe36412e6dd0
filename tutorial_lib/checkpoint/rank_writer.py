"""Writer of one rank's files: it writes immediately, or on a thread from a snapshot while training continues.

Each rank hashes its files while writing them, so only files that a library wrote by itself are read again for
their SHA-256. A file counts as written once it is on disk (``fsync``).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils.serialization import config as serialization

from tutorial_lib.checkpoint.manifest import file_entry, sync


def make_stager() -> DefaultStager:
    """Return a stager that copies states to host memory, as in ``torch.distributed.checkpoint.async_save``.

    Every snapshot reuses the same memory, which holds one more copy of this rank's states until the run ends. Tensors
    that share memory in the states also share it in the copy.
    """
    return DefaultStager(StagingOptions(False, False, False, False))


class Writer:
    """Writes one rank's files of one checkpoint.

    Args:
        root: the checkpoint's directory.
        stager: with a stager, :meth:`submit` returns before the job is done, so a job must only use a :meth:`snapshot`.
            Without one, every job is done immediately, from the states themselves.

    Attributes:
        files: size and SHA-256 of every file written so far, by name relative to ``root``.
    """

    def __init__(self, root: Path, stager: DefaultStager | None = None) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.file_system = _HashingFileSystem(root, self.files)
        self._stager = stager
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if stager else None
        self._jobs: list[Future[None]] = []
        self._began = time.perf_counter()
        self._seconds = 0.0

    def snapshot(self, states: dict[str, Any]) -> Any:
        """Return the current states, or with a stager a copy in host memory, because training changes them in place."""
        return self._stager.stage(states) if self._stager else states

    def save(self, states: dict[str, Any], path: Path) -> None:
        """Write a file with ``torch.save``."""
        self.submit(self._save, self.snapshot(states), path)

    def _save(self, states: Any, path: Path) -> None:
        with self.file_system.create_stream(path, "wb") as stream:
            torch.save(states, stream)

    def sharded(self, directory: Path) -> FileSystemWriter:
        """Return a storage writer for ``torch.distributed.checkpoint`` that adds its files to :attr:`files`."""
        storage = FileSystemWriter(directory, sync_files=False)  # synced when closed, like all others
        if self._stager:  # the snapshot is in host memory; copying ahead would only wait for the GPU's work
            storage.per_thread_copy_ahead = 0
        storage.fs = self.file_system
        return storage

    def add_files(self, directory: Path, is_own: Callable[[str], bool] = lambda name: True) -> None:
        """Add files that a library wrote by itself.

        Args:
            directory: where they are.
            is_own: tells from a file's name, relative to the checkpoint's directory, whether this rank wrote it.
        """
        for path in sorted(directory.rglob("*")):
            if path.is_file() and is_own(self.file_system.name(path)):
                sync(path)
                self.files[self.file_system.name(path)] = file_entry(path)

    def submit(self, job: Callable[..., Any], *given: Any) -> None:
        """Run a job immediately, or on the thread after the jobs submitted before it."""
        if self._thread:
            self._jobs.append(self._thread.submit(self._run, job, *given))
        else:
            self._run(job, *given)

    def _run(self, job: Callable[..., Any], *given: Any) -> None:
        # torch's own checksum costs half as much as a SHA-256, and torch.load ignores it.
        with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            job(*given)
        self._seconds = time.perf_counter() - self._began

    def is_done(self) -> bool:
        """Return whether all files are written. Raise the first error of a job, if there is one."""
        done = [job for job in self._jobs if job.done()]
        for job in done:
            job.result()
        return len(done) == len(self._jobs)

    def wait(self) -> float:
        """Wait until all files are written; return the seconds from the writer's creation to the last file."""
        for job in self._jobs:
            job.result()
        self.close()
        return self._seconds

    def close(self) -> None:
        """Wait until the thread has ended, even if its work failed."""
        if self._thread:
            self._thread.shutdown(wait=True, cancel_futures=True)


MakeWriter = Callable[[Path, DefaultStager | None], Writer]
"""Makes a writer from a checkpoint's directory and the stager, if there is one."""


class _HashingFileSystem(FileSystem):
    """File system for torch's writers that opens every file as a :class:`_HashedFile`."""

    def __init__(self, root: Path, files: dict[str, dict[str, Any]]) -> None:
        self._root, self._files = root, files

    def name(self, path: Any) -> str:
        return str(Path(path).relative_to(self._root))

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashed = _HashedFile(stream)
            try:
                yield hashed
                stream.flush()
                # Without this, a power failure could leave a checkpoint with its final name, but without its content.
                os.fsync(stream.fileno())
            except Exception as error:
                # If the disk is full, torch.save reports "unexpected pos".
                failure = hashed.failure or error
                if isinstance(failure, OSError) and failure.filename is None:
                    failure.filename = str(path)
                if failure is error:
                    raise
                raise failure from error
        self._files[self.name(path)] = {"bytes": hashed.tell(), "sha256": hashed.sha256.hexdigest()}

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self._files[self.name(new_path)] = self._files.pop(self.name(path))


class _HashedFile:
    """A file that is hashed while it is written sequentially.

    Attributes:
        sha256: SHA-256 of the bytes written so far.
        failure: the first error of a write; ``torch.save`` may replace it with a different one.
    """

    def __init__(self, stream: Any) -> None:
        self.name, self.sha256 = str(stream.name), hashlib.sha256()
        self.failure: Exception | None = None
        self._stream, self._size = stream, 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            written: int = self._stream.write(data)
        except Exception as error:
            self.failure = self.failure or error
            raise
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Do nothing: the caller that opened the file closes it."""
