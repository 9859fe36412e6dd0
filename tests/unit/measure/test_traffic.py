"""Counter of collectives, on two real ranks whose traffic is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support.launching import ROOT
from tutorial_lib.measure.traffic import count_collectives


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the counts of :mod:`tests.support.traffic_worker` on each of two ranks."""
    directory = tmp_path_factory.mktemp("traffic")
    worker = [sys.executable, "-m", "tests.support.traffic_worker"]
    processes = [
        subprocess.Popen(
            [*worker, str(rank), str(directory / "store"), str(directory / f"{rank}.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        assert process.returncode == 0, errors
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_kind_is_counted_with_the_full_tensors_elements(counted: list[dict[str, Any]]) -> None:
    for rank, counts in enumerate(counted):
        assert counts["each_kind"]["elements"] == {
            "all_reduce": [101, 102, 103],
            "broadcast": [201],
            "reduce": [301],
            "all_gather": [802, 804, 806],
            "reduce_scatter": [1002, 1004, 1006],
            "all_to_all": [1200],
            "gather": [1402],
            "scatter": [1602],
            ("send" if rank == 0 else "recv"): [901],
        }


def test_volume_counts_an_all_reduce_twice(counted: list[dict[str, Any]]) -> None:
    once = 201 + 301 + 802 + 804 + 806 + 1002 + 1004 + 1006 + 1200 + 1402 + 1602
    volume = 2 * (101 + 102 + 103) + once
    assert [c["each_kind"]["volume"] for c in counted] == [volume + 901, volume]
    # A ring of two sends half; a message is sent in full.
    assert [c["each_kind"]["wire_bytes"] for c in counted] == [4 * (volume / 2 + 901), 4 * volume / 2]


def test_bookkeeping_is_kept_apart(counted: list[dict[str, Any]]) -> None:
    summary = counted[0]["bookkeeping"]["dict"]
    assert summary["tensors"] == [
        {"kind": "all_reduce", "dtype": "bfloat16", "count": 1, "in_backward": 0, "elements": 64, "bytes": 128}
    ]
    assert (summary["volume"], summary["volume_bytes"], summary["wire_bytes"]) == (128, 256, 128)
    rest = {(row["kind"], row["dtype"]): (row["count"], row["elements"]) for row in summary["bookkeeping"]}
    assert rest.pop(("all_gather", "uint8"))[0] == 1  # the pickled object
    assert rest == {
        ("all_reduce", "float32"): (1, 1),
        ("all_reduce", "float64"): (1, 2),
        ("all_gather", "int64"): (1, 2),  # the pickled object's size
        ("all_reduce", "int64"): (1, 1000),
        ("barrier", "uint8"): (1, 0),
    }


def test_hooks_in_backward_are_counted_and_other_blocks_are_not(counted: list[dict[str, Any]]) -> None:
    assert counted[0]["in_backward"]["elements"] == {"all_reduce": [77]}


def test_a_group_of_one_sends_nothing(counted: list[dict[str, Any]]) -> None:
    assert counted[0]["of_one_rank"]["elements"] == {"all_reduce": [100]}
    assert counted[0]["of_one_rank"]["volume"] == counted[0]["of_one_rank"]["wire_bytes"] == 0


def test_collectives_are_assigned_to_the_axis_of_their_ranks(counted: list[dict[str, Any]]) -> None:
    for counts in counted:
        axes = counts["along_axes"]["dict"]["axes"]
        assert {axis: sum(row["elements"] for row in axes[axis]["tensors"]) for axis in axes} == {"tp": 110, "dp": 50}
        assert (axes["tp"]["volume"], axes["tp"]["wire_bytes"], axes["dp"]["volume"]) == (220, 440, 0)
        assert "axes" not in counts["each_kind"]["dict"]


def test_fsdp_sends_three_psi_and_tensor_parallelism_two_all_reduces(counted: list[dict[str, Any]]) -> None:
    for counts in counted:
        assert counts["fsdp"]["elements"] == {"all_gather": [128] * 4, "reduce_scatter": [128] * 2}
        assert counts["fsdp"]["volume"] == 3 * 256
        assert counts["tensor_parallel"]["elements"] == {"all_reduce": [24, 24]}


def test_traffic_inside_dtensor_operators_is_counted(counted: list[dict[str, Any]]) -> None:
    assert counted[0]["inside_an_operator"]["elements"] == {"all_gather": [64]}


def test_all_collective_operators_of_torch_are_known() -> None:
    """A new PyTorch may add a collective, on which counting would raise. This test fails before that happens."""
    # Importing this module registers its operators.
    import torch.distributed._functional_collectives

    from tutorial_lib.measure import traffic

    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    collectives = {n.split("::")[1] for n in names if n.split("::")[0] in traffic._NAMESPACES}
    # Batches of sends and receives are not counted, because only pipelines use them, and there are none here.
    assert collectives - set(traffic._KINDS) - traffic._NOT_COLLECTIVE == {"batch_p2p_ops"}
    assert len(collectives) > 25


def test_without_collectives_nothing_is_counted() -> None:
    with count_collectives() as traffic:
        torch.ones(10) @ torch.ones(10)
    assert traffic.to_dict() == {
        "volume": 0, "volume_bytes": 0, "wire_bytes": 0.0, "tensors": [], "bookkeeping": []
    }  # fmt: skip
