"""GPU figures quoted in the lessons, each of which must match docs/measured/h200."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from tests.notebooks.run import NOTEBOOKS
from tests.theory.gpu_runs import measured, workshop_runs

GIB = 2**30
WAYS = {"plain PyTorch": "plain torch", **{f"stage {stage}": f"ZeRO-{stage}" for stage in range(4)}}


def text_of(name: str) -> str:
    document: Any = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    return "\n".join(cell.source for cell in document.cells if cell.cell_type == "markdown")


@pytest.fixture
def runs() -> dict[str, Any]:
    return {row["case"]: row for row in measured("workshop")}


def test_table_of_the_workshop(runs: dict[str, Any]) -> None:
    lines = re.findall(
        r"^\| (plain PyTorch|stage \d)(, offload)?(, pinned)? \| (.*) \|$", text_of("05_zero_workshop"), re.M
    )
    rows = [line for line in lines if line[3].count("|") == 3]
    assert len(rows) == 9
    for way, offload, pinned, cells in rows:
        run = runs[f"bloom-560m: {WAYS[way]}{', offload optimizer' if offload else ''}{pinned}"]
        peak = run.get("allocator_peak_bytes")
        assert cells.split(" | ") == [
            f"{run['states_bytes']['by_device']['cuda'] / GIB:.2f}", f"{run['step_peak_bytes'] / GIB:.2f}",
            "-" if peak is None else f"{peak / GIB:.2f}", f"{run['samples_per_second']:.1f}",
        ]  # fmt: skip


def test_sentences_about_the_h200(runs: dict[str, Any]) -> None:
    names = ("05_zero_workshop", "01_zero_finetuning", "03_fsdp")
    workshop, zero, fsdp = (" ".join(re.sub("^> ", "", text_of(name), flags=re.M).split()) for name in names)
    plain, offloaded = runs["bloom-560m: plain torch"], runs["bloom-560m: ZeRO-2, offload optimizer"]
    freed = (plain["states_bytes"]["total"] - offloaded["states_bytes"]["by_device"]["cuda"]) / GIB
    on_host = offloaded["states_bytes"]["by_device"]["cpu"] / GIB
    assert f"Offload takes {freed:.1f} GiB off the GPU (the host holds {on_host:.1f}:" in workshop
    assert f"frees {freed:.1f} GiB" in zero
    assert f"reaches only {plain['mfu']:.0%} of this GPU's peak".replace("%", " %") in workshop
    large = runs["bloom-560m: plain torch, 4 micro-batches of 16"]
    assert "Larger micro-batches help" in workshop and large["mfu"] > 2 * plain["mfu"]
    seconds = {case: row["step_seconds"]["median"] for case, row in runs.items() if case.startswith("bloom-560m: ZeRO")}
    stages = [seconds[f"bloom-560m: ZeRO-{stage}"] for stage in range(4)]
    assert all(abs(each - 0.5) < 0.06 for each in stages[:3])
    assert f"about half a second at stages 0 to 2, and {stages[3]:.2f} s at stage 3" in zero
    slower, pinned = (seconds[f"bloom-560m: ZeRO-2, offload optimizer{how}"] / stages[2] for how in ("", ", pinned"))
    assert f"takes {slower:.1f} times as long, or {pinned:.1f} times with `pin_memory`" in zero
    assert "within 0.7 %" in workshop and max(abs(run.peak_error) for run in workshop_runs()) < 0.0075
    kept_busy = [row["mfu"] for row in measured("fsdp2-one-billion")[0]["rows"] if row["micro_batch"] >= 24]
    assert "42 to 43.5 %" in " ".join(text_of("06_scaling_out").split())
    assert (f"{min(kept_busy):.2f}", f"{max(kept_busy):.3f}") == ("0.42", "0.435")
    tables, largest = measured("fsdp2-one-billion"), (48, 192)
    for table, rows in zip(tables, largest, strict=True):
        row = table["rows"][-1]
        assert row["micro_batch"] == rows and f"{100 * row['mfu']:.1f} %" in fsdp
    kept, recomputed = (table["rows"][-1]["mfu"] for table in tables)
    assert "four times the batch at six sevenths of the speed" in fsdp
    assert largest[1] == 4 * largest[0] and abs(recomputed / kept - 6 / 7) < 0.01


def test_what_was_equal_and_what_resumed() -> None:
    rows = {row["case"]: row for row in measured("equality")}
    fp32 = [row for case, row in rows.items() if case.endswith("fp32")]
    assert len(fp32) == 18 and all(len(row["losses"]) == 5 and row["largest_difference"] < 1e-6 for row in fp32)
    resumed = {case: row for case, row in rows.items() if case.startswith("resume")}
    assert resumed.keys() == {f"resume {engine}" for engine in ("torch", "zero1", "zero3", "fsdp")}
    for row in resumed.values():
        assert row["repeatable"] and row["same_losses"] and row["same_weights_and_moments"]
