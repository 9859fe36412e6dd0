"""A checkpoint's files: the bytes and the digest are those that were given, whatever the storage can do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tutorial_lib.checkpoint import hashed_file
from tutorial_lib.checkpoint.hashed_file import BLOCK, HashedFile

SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def write(path: Path, data: bytes) -> HashedFile:
    """In pieces of many sizes, some larger than a block."""
    pieces = random.Random(0)
    with path.open("wb") as file, HashedFile(file) as hashed:
        rest = memoryview(data)
        while rest:
            size = min(len(rest), pieces.choice([1, 100, 4096, BLOCK // 3, BLOCK, 2 * BLOCK]))
            assert hashed.write(rest[:size]) == size
            rest = rest[size:]
            assert hashed.tell() == len(data) - len(rest)
        hashed.finish()
        assert hashed.tell() == len(data)
    return hashed


def check(path: Path, size: int) -> None:
    data = content(size)
    hashed = write(path, data)
    assert path.read_bytes() == data
    assert hashed.digest.hexdigest() == hashlib.sha256(data).hexdigest()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slow", [False, True])
def test_what_was_given_lies_there(tmp_path, monkeypatch, size, slow):
    """Also if the disk is slower than who writes: a buffer that is under way is not filled anew."""
    pwrite = os.pwrite

    def late(*given):
        time.sleep(0.02)
        return pwrite(*given)

    if slow:
        monkeypatch.setattr(os, "pwrite", late)
    check(tmp_path / "file", size)


def test_a_file_system_in_memory_takes_it_as_well(tmp_path):
    path = Path("/dev/shm") / f"tutorial-lib-{tmp_path.name}-{os.getpid()}"
    try:
        check(path, SIZES[-1])
    finally:
        path.unlink()


def test_whole_blocks_go_past_the_page_cache(tmp_path, monkeypatch):
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip()
    if kind not in ("ext2/ext3", "xfs", "f2fs", "overlayfs"):  # ext4 has the number of its predecessors
        pytest.skip(f"the tests' directory is on {kind}, which is not written to directly")
    pwrite, seen = os.pwrite, []

    def watched(descriptor, block, offset):
        seen.append((len(block), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return pwrite(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    check(tmp_path / "file", 3 * BLOCK + 17)
    assert seen == [(BLOCK, True)] * 3 + [(17, False)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refused", ["at once", "by the second write", "after half a block"])
def test_storage_that_stops_taking_direct_writes(tmp_path, monkeypatch, refused, number):
    """Its blocks are larger, or it was nearly full and the write that follows begins within one; any error may tell."""
    pwrite, direct_writes = os.pwrite, []

    def refusing(descriptor, block, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct_writes.append(offset)
            if refused == "after half a block" and len(direct_writes) == 2:
                return pwrite(descriptor, block[: BLOCK // 2], offset)
            if refused == "at once" or len(direct_writes) >= 2:
                raise OSError(number, os.strerror(number))
        return pwrite(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    monkeypatch.setattr(hashed_file, "_is_local", lambda device: True)
    check(tmp_path / "file", 3 * BLOCK + 17)
    assert direct_writes


def test_what_is_no_local_disk_is_written_as_any_other_file(tmp_path, monkeypatch):
    def refusing(descriptor, command, *flags):
        raise AssertionError("direct writes were asked for")

    monkeypatch.setattr(hashed_file, "LOCAL", ())
    hashed_file._is_local.cache_clear()
    monkeypatch.setattr(fcntl, "fcntl", refusing)
    check(tmp_path / "file", 3 * BLOCK + 17)
    hashed_file._is_local.cache_clear()


@pytest.mark.parametrize("size", [17, BLOCK, 2 * BLOCK, 3 * BLOCK + 17])
def test_an_error_under_way_is_raised_and_kept(tmp_path, monkeypatch, size):
    def full(descriptor, block, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (tmp_path / "file").open("wb") as file, HashedFile(file) as hashed:
        with pytest.raises(OSError, match="No space left"):
            for start in range(0, size, BLOCK):
                hashed.write(content(size)[start : start + BLOCK])
            hashed.finish()
        assert (hashed.failure is not None) == (size > BLOCK), "told by a write; finish() tells its own"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
