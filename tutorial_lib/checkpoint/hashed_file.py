"""One file of a checkpoint: hashed while it is written, and written past the operating system's page cache.

An ordinary write copies into the page cache: memory has to be found for every page of a file as large as the model, and
what was cached until then, such as the training data, has to go. Nobody reads a checkpoint soon. So blocks go straight
to the disk (``O_DIRECT``) from a small buffer: one is under way while the next is filled and hashed. On other than the
usual local file systems they are written as any other: over a network, each direct write would wait for its answer.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK = 2**20
"""Bytes that are written at once: few enough for the processor's cache, and whole blocks of any usual storage."""

LOCAL = ("ext4", "xfs", "f2fs", "overlay")
"""File systems that are written to directly."""

_DIRECT = getattr(os, "O_DIRECT", 0)
"""Not on every system: without, nothing is written directly."""


class HashedFile:
    """Written from its beginning to its end. Use it as a context manager, and :meth:`finish` what is to count.

    Args:
        file: opened for writing, and empty.

    Attributes:
        digest: the SHA-256 of what was written so far, but for the block that is being filled.
        failure: the first error that was met; who writes may make another of it.
    """

    def __init__(self, file: Any) -> None:
        self.name, self.digest = str(file.name), hashlib.sha256()
        self.failure: Exception | None = None
        self._descriptor = file.fileno()
        self._buffers = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(2)]  # aligned to pages
        self._filled = self._sent = 0
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None
        self._direct = False

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def write(self, data: Any) -> int:
        """Take bytes. An error of the storage may come with a later call."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            taken = min(len(rest), BLOCK - self._filled)
            self._buffers[0][self._filled : self._filled + taken] = rest[:taken]
            rest, self._filled = rest[taken:], self._filled + taken
            if self._filled == BLOCK:
                try:
                    self._send_block()
                except Exception as error:
                    self.failure = self.failure or error
                    raise
        return size

    def tell(self) -> int:
        return self._sent + self._filled

    def finish(self) -> None:
        """Write what is left, and have all of it on the disk itself.

        Else a power cut could leave a checkpoint that has its name and not its content.
        """
        self._wait()
        rest = self._buffers[0][: self._filled]
        self.digest.update(rest)
        self._write_directly(False)  # it is no whole block
        self._put(rest, self._sent)
        self._sent, self._filled = self.tell(), 0
        os.fsync(self._descriptor)

    def flush(self) -> None:
        """Nothing reads the file before it is finished."""

    def close(self) -> None:
        """Closed by whoever opened it."""

    def _send_block(self) -> None:
        if not self._thread:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-block")
            self._write_directly(_is_local(os.fstat(self._descriptor).st_dev))
        self._wait()
        block = self._buffers[0]
        self._under_way = self._thread.submit(self._put, block, self._sent)
        self.digest.update(block)  # releases the interpreter's lock, as writing does
        self._sent, self._filled = self._sent + BLOCK, 0
        self._buffers.reverse()

    def _wait(self) -> None:
        """Return when the block under way is written: its buffer is free again."""
        if self._under_way:
            self._under_way.result()

    def _put(self, block: memoryview, offset: int) -> None:
        while block:
            try:
                written = os.pwrite(self._descriptor, block, offset)
            except OSError:
                if not self._direct:
                    raise
                # This storage's blocks are larger, or the last write ended within one. What else it is comes again.
                self._write_directly(False)
                continue
            block, offset = block[written:], offset + written

    def _write_directly(self, direct: bool) -> None:
        if direct == self._direct or not _DIRECT:
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return  # a file system that has no direct writes
        self._direct = direct


@functools.cache
def _is_local(device: int) -> bool:
    """Whether a device, by its number, holds one of :data:`LOCAL`. Mounts are listed in ``proc(5)``'s mountinfo."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    return any(mount[2] == number and mount[mount.index("-") + 1] in LOCAL for mount in mounts)
