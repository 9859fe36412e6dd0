"""Measuring instruments on objects of known size: if they are off by a byte, so is the course."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tutorial_lib import trainer
from tutorial_lib.config import Config
from tutorial_lib.measure import memory, speed
from tutorial_lib.measure.traffic import Collective, Traffic, count_collectives

MIB = 1 << 20


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_views_and_tied_tensors_count_once() -> None:
    a = torch.zeros(100)
    tied = torch.nn.Parameter(a)
    assert memory.tensor_bytes([a, a.view(10, 10), a[:3], tied]) == 400
    assert memory.tensor_bytes([a, torch.zeros(100)]) == 800
    assert memory.tensor_bytes([a.to(torch.bfloat16), torch.zeros(7, dtype=torch.float64)]) == 200 + 56


def test_a_slice_counts_as_the_buffer_that_it_keeps_alive() -> None:
    assert memory.tensor_bytes([torch.zeros(1000)[:1]]) == 4000


def test_released_and_meta_tensors_hold_nothing() -> None:
    released = torch.zeros(1000)
    released.untyped_storage().resize_(0)
    assert memory.tensor_bytes([released, torch.zeros(1000, device="meta")]) == 0


def test_temporary_tensors_of_a_generator_are_told_apart() -> None:
    assert memory.tensor_bytes(torch.zeros(100) for _ in range(5)) == 5 * 400


def test_states_by_part_and_device() -> None:
    flat = torch.zeros(100)
    states = memory.StateBytes.of(
        {"parameters": [flat[:50]], "gradients": [torch.zeros(10)], "optimizer": [flat[50:], torch.zeros(20)]}
    )
    assert states.to_dict() == {
        "parameters": 400,
        "gradients": 40,
        "optimizer": 80,  # the flat buffer has been counted with the parameters
        "total": 520,
        "by_device": {"cpu": 520},
    }
    with pytest.raises(ValueError, match="gradient"):
        memory.StateBytes.of({"gradient": [flat]})


# --- allocator, process ----------------------------------------------------------------------------------------------


def test_allocations_of_a_block_to_the_byte() -> None:
    before = torch.zeros(1_000_000)
    with memory.count_allocations() as allocations:
        a = torch.empty(2_500_000)  # 10 MB
        b = torch.empty(1_000_000)  # + 4 MB
        del a, before
        c = torch.empty(500_000)  # - 10 MB, + 2 MB
    assert allocations.peak == {"cpu": 14_000_000}
    assert allocations.remaining == {"cpu": 6_000_000}
    assert b.numel() + c.numel() == 1_500_000


def test_allocations_see_what_an_operator_frees_again() -> None:
    """Of (a * a).sum() only a number remains, but the product existed, in forward and in backward."""
    a = torch.ones(1_000_000, requires_grad=True)
    with memory.count_allocations() as allocations:
        (a * a).sum().backward()
    assert 8_000_000 <= allocations.peak["cpu"] < 20_000_000
    assert a.grad is not None and allocations.remaining["cpu"] == 4_000_000


def test_no_allocation_is_no_entry() -> None:
    with memory.count_allocations() as allocations:
        pass
    assert allocations.peak == allocations.remaining == {}


def test_peak_of_the_process_sees_a_buffer_come_and_go() -> None:
    with memory.PeakMemory(interval=0.005, pss=True) as watched:
        buffer = bytearray(os.urandom(1)) * (200 * MIB)
        time.sleep(0.05)
        del buffer
        time.sleep(0.05)
    assert 195 * MIB < watched.increase < 230 * MIB
    assert watched.samples[-1].rss < watched.peak_rss - 150 * MIB
    assert watched.peak_pss is None or 195 * MIB < watched.peak_pss
    summary = watched.summary()
    assert summary["peak"] == watched.peak_rss >= summary["mean"] > 0 and summary["mode"] > 0


def test_the_kernels_mark_catches_what_the_sampler_misses() -> None:
    with memory.PeakMemory(interval=60) as watched:
        buffer = bytearray(os.urandom(1)) * (200 * MIB)
        del buffer
    if not watched.exact:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert len(watched.samples) == 2 and max(s.rss for s in watched.samples) < watched.peak_rss - 150 * MIB
    assert 195 * MIB < watched.increase < 230 * MIB


def test_host_memory_is_this_process() -> None:
    now = memory.host_memory()
    assert now.peak_rss >= now.rss > 50 * MIB
    assert now.pss is None or 0 < now.pss <= now.rss


def test_peak_memory_begins_anew_and_sees_what_has_been_freed() -> None:
    cpu = torch.device("cpu")
    before = memory.host_memory().rss
    memory.reset_peak_memory(cpu)
    torch.ones(64 * 2**20)  # 256 MiB, written and freed
    assert memory.peak_memory(cpu) > before + 200 * 2**20
    if sys.platform == "linux" and memory._reset_high_water_mark():
        assert memory.peak_memory(cpu) < before + 200 * 2**20


def test_a_run_records_the_peak_of_its_measured_step(tmp_path: Path) -> None:
    """With rows of twice the length, gradients stay the same, but logits and more double."""
    peaks = {}
    for length in (32, 64):
        config = Config.create(
            "cpu", name=f"rows-of-{length}", storage=str(tmp_path), engine="torch", dp=1, launcher="none", steps=3,
            global_batch=2, seq_length=length, batching="max_length", measure=True, evaluate=False,
        )  # fmt: skip
        (rank,) = trainer.train(config).ranks
        peaks[length] = rank["measured"]["peak_bytes"]["cpu"]
        assert peaks[length] >= 4 * rank["measured"]["num_parameters"]
    logits = 4 * 2 * 32 * 2048  # fp32, two rows of 32 tokens, a vocabulary of 2048
    assert logits <= peaks[64] - peaks[32] <= 20 * logits


# --- traffic ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the counts of traffic_worker.py on each of two ranks."""
    directory = tmp_path_factory.mktemp("traffic")
    worker = Path(__file__).with_name("traffic_worker.py")
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(directory / "store"), str(directory / f"{rank}.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
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
    # A ring of two sends half; a message goes whole.
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


def test_collectives_are_told_apart_by_the_axis_of_their_ranks(counted: list[dict[str, Any]]) -> None:
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


def test_what_a_dtensor_sends_inside_an_operator_is_counted(counted: list[dict[str, Any]]) -> None:
    assert counted[0]["inside_an_operator"]["elements"] == {"all_gather": [64]}


def test_an_unknown_kind_is_refused() -> None:
    traffic = Traffic([Collective("all_reduce", 10, "float32", 4, 2, True)])
    assert traffic.elements() == traffic.elements("all_reduce") == 10
    assert traffic.bytes() == 40 and traffic.count() == 1 and traffic.count("broadcast") == 0
    with pytest.raises(ValueError, match=r"allreduce.*all_reduce"):
        traffic.elements("allreduce")


def test_every_operator_that_torch_has_is_known() -> None:
    """A new PyTorch may add a collective; counting would raise on it, and this test says so first."""
    # Importing it registers its operators.
    import torch.distributed._functional_collectives

    from tutorial_lib.measure import traffic

    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    collectives = {n.split("::")[1] for n in names if n.split("::")[0] in traffic._NAMESPACES}
    # A batch of sends and receives has no count of its own: pipelines use it, and nothing here does.
    assert collectives - set(traffic._KINDS) - traffic._NOT_COLLECTIVE == {"batch_p2p_ops"}
    assert len(collectives) > 25


def test_nothing_is_counted_without_collectives() -> None:
    with count_collectives() as traffic:
        torch.ones(10) @ torch.ones(10)
    assert traffic.to_dict() == {
        "volume": 0, "volume_bytes": 0, "wire_bytes": 0.0, "tensors": [], "bookkeeping": []
    }  # fmt: skip


# --- speed -----------------------------------------------------------------------------------------------------------


def test_tokens_per_second_leaves_out_the_first_step() -> None:
    rows = [{"tokens": 100, "seconds": 10.0}, {"tokens": 300, "seconds": 1.0}, {"tokens": 100, "seconds": 1.0}]
    assert speed.tokens_per_second(rows) == 200
    assert speed.tokens_per_second(rows, skip=0) == 500 / 12
    with pytest.raises(ValueError, match="run more steps"):
        speed.tokens_per_second(rows[:1])


def test_matmul_peak_is_a_plausible_number_of_flops() -> None:
    before = torch.get_num_threads()
    peak = speed.matmul_peak(256, seconds=0.05, num_threads=1)
    assert 1e8 < peak < 1e13
    assert torch.get_num_threads() == before


def test_time_ratio_alternates_and_takes_the_median() -> None:
    ratio = speed.time_ratio(lambda: time.sleep(0.1), lambda: time.sleep(0.001), pairs=3)
    assert 1 < ratio.lowest <= ratio.median <= ratio.highest and ratio.pairs == 3
