"""Comparison of two rows or two matrices: saved memory, changed runtime, and rows that cannot be compared."""

from __future__ import annotations

import pytest

from tests.support.bench_records import done
from tutorial_lib.bench import Matrix, compare
from tutorial_lib.bench.record import OUT_OF_MEMORY, RowRecord
from tutorial_lib.config import ConfigError
from tutorial_lib.measure.memory_log import MIB, MemorySummary


@pytest.fixture
def storage(tmp_path):
    half = MemorySummary("PSS", 512 * MIB, 500.0 * MIB, (), 10)
    zero2 = {"zero_stage": 2, "offload": "optimizer", "pin_memory": False, "dp": 1, "engine": "deepspeed"}
    rows = (
        done("stage-2"),
        done("stage-2-offload", process_tree=half, train_seconds=3.0, settings=zero2),
        RowRecord("stage-3", OUT_OF_MEMORY, "Rank 1 failed with MemoryError"),
        RowRecord("stage-3-offload"),
    )
    Matrix("offload", tmp_path / "one", {}, rows).write()
    Matrix("offload", tmp_path / "two", {}, (done("stage-2", train_seconds=1.0), done("other"))).write()
    return tmp_path


def test_two_rows_show_saving_and_change(storage):
    first, second = compare("one/stage-2", "one/stage-2-offload", storage=storage).differences
    assert (first.memory, first.saving_percent, first.change_percent) == ("process tree", 50.0, 50.0)
    assert (second.memory, second.saving_percent) == ("states per rank", 0.0)


def test_the_table_matches_the_workshop(storage):
    shown = compare("one/stage-2", "one/stage-2-offload", storage=storage).table()
    assert shown.columns == (
        "rows", "memory of", "memory without (MiB)", "memory with (MiB)", "saving (%)",
        "runtime without (s)", "runtime with (s)", "change (%)",
    )  # fmt: skip
    assert shown.rows[0] == (
        "stage-2, stage-2-offload", "process tree", "1,024.00", "512.00", "50.0", "2", "3", "+50.0",
    )  # fmt: skip


def test_long_runs_are_compared_in_whole_seconds(storage):
    Matrix("offload", storage / "long", {}, (done("a", train_seconds=2345.6), done("b", train_seconds=1e5))).write()
    assert compare("long/a", "long/b", storage=storage).table().rows[0][5:7] == ("2,346", "100,000")


def test_gpus_are_compared_where_both_have_some(storage):
    gpus = [MemorySummary("GPU", size * MIB, size * MIB, (), 3) for size in (100, 25)]
    Matrix("offload", storage / "gpu", {}, tuple(done(f"r{i}", gpu=gpu) for i, gpu in enumerate(gpus))).write()
    kinds = {each.memory: each.saving_percent for each in compare("gpu/r0", "gpu/r1", storage=storage).differences}
    assert kinds["GPU"] == 75.0


@pytest.mark.parametrize("name", ["one/stage-2-offload", "{}/one/stage-2-offload", "{}/one/rows/stage-2-offload"])
def test_a_row_is_found_by_name_or_directory(storage, name):
    found = compare("one/stage-2", name.format(storage), storage=storage)
    assert found.differences[0].memory_with == 512 * MIB


def test_a_row_is_found_by_its_name_in_the_workshop(storage):
    assert compare("one/stage-2", "one/2ZO-1G1N", storage=storage).differences[0].memory_with == 512 * MIB


def test_two_matrices_are_compared_row_by_row(storage):
    found = compare("two", "two", storage=storage)
    assert {each.rows for each in found.differences} == {"stage-2", "other"}
    assert {each.change_percent for each in found.differences} == {0.0}


@pytest.mark.parametrize(
    ("without", "with_", "message"),
    [
        ("one/stage-2", "one/stage-3", r"'stage-3' is not done: out of memory \(Rank 1 failed.* bench with --retry"),
        ("one/stage-2", "one/stage-3-offload", "'stage-3-offload' is not done: not run. .* until bench runs it"),
        ("one/stage-2", "one/stage-9", "has no row 'stage-9'. Write one of: stage-2, stage-2-offload"),
        ("one/stage-2", "three/stage-2", "There is no matrix 'three/stage-2'"),
        ("one/stage-2", "two", "one is a row, the other a matrix"),
    ],
)
def test_rows_that_cannot_be_compared_are_named(storage, without, with_, message):
    with pytest.raises(ConfigError, match=message):
        compare(without, with_, storage=storage)
