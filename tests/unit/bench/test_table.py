"""Tables of a matrix: units, missing measurements, efficiency, and remarks on rows that are not done."""

from __future__ import annotations

import csv

import pytest

from tests.support.bench_records import done
from tutorial_lib.bench import table
from tutorial_lib.bench.record import KILLED, RowRecord
from tutorial_lib.measure.memory_log import MIB, MemorySummary
from tutorial_lib.theory.memory import ModelStates


def cells(experiment: str, rows: list[RowRecord], about: str = "all") -> list[dict[str, str]]:
    shown = table.build(experiment, rows, about)
    return [dict(zip(shown.columns, row, strict=True)) for row in shown.rows]


def test_a_row_shows_the_columns_of_the_workshop():
    (row,) = cells("zero-stages", [done("stage-2")])
    assert row == {
        "row": "stage-2", "status": "done", "train loss": "3.5000", "eval loss": "3.2500 3.0000",
        "train samples/s": "10", "eval samples/s": "not measured", "s/step (median)": "0.4",
        "predicted s/step": "not predicted", "steps/epoch": "8", "steps": "5", "processes": "1",
        "process tree peak (MiB)": "1,024", "process tree average (MiB)": "900",
        "process tree mode (MiB)": "890", "GPU peak (MiB)": "not measured", "GPU average (MiB)": "not measured",
        "GPU mode (MiB)": "not measured", "states/rank (MiB)": "160.00", "predicted (MiB)": "160.00",
        "error (%)": "+0.00", "step peak (MiB)": "35.1", "predicted peak (MiB)": "34.8",
    }  # fmt: skip


def test_a_predicted_time_shows_beside_the_measured_one(tmp_path):
    rows = [done("stage-2", predicted_step_seconds=0.25)]
    (row,) = cells("zero-stages", rows, "speed")
    assert row["s/step (median)"] == "0.4" and row["predicted s/step"] == "0.25"
    table.write("zero-stages", rows, tmp_path)
    (plain,) = csv.DictReader((tmp_path / "table.csv").open())
    assert plain["predicted s/step"] == "0.25" and "predicted s/step" in (tmp_path / "table.md").read_text()


def test_gpus_and_errors_show_in_their_columns():
    predicted = (ModelStates(40 * MIB, 40 * MIB, 70 * MIB),)
    gpu = MemorySummary("GPU", 2048 * MIB, 2000.5 * MIB, (), 3)
    (row,) = cells("zero-stages", [done("stage-2", gpu=gpu, predicted_states=predicted)])
    assert (row["GPU peak (MiB)"], row["GPU average (MiB)"], row["GPU mode (MiB)"]) == ("2,048", "2,000", "all differ")
    assert row["error (%)"] == "+6.67"


def test_a_row_that_is_not_done_has_dashes_and_a_remark():
    rows = [done("a"), RowRecord("b", KILLED, "Rank 0 ended with exit code -9"), RowRecord("c")]
    shown = cells("offload", rows)
    assert [row["status"] for row in shown] == ["done", "killed", "not run"]
    assert set(shown[1].values()) == {"b", "killed", "-"}
    assert table.remarks(rows) == ["b: killed: Rank 0 ended with exit code -9"]


def test_efficiency_is_speed_per_process_against_the_fewest_processes():
    speeds = {4: 24.0, 1: 10.0, 2: 18.0}
    rows = [done(f"dp-{n}", world_size=n, samples_per_second=speed) for n, speed in speeds.items()]
    assert [row["efficiency (%)"] for row in cells("weak-scaling", rows)] == ["60.0", "100.0", "90.0"]
    assert "efficiency (%)" not in cells("offload", rows)[0]


def test_parts_of_the_table_share_the_name_and_the_status():
    rows = [done("a")]
    speed, memory = (set(cells("offload", rows, about)[0]) for about in ("speed", "memory"))
    assert speed & memory == {"row", "status"} and speed | memory == set(cells("offload", rows)[0])
    with pytest.raises(ValueError, match="Write 'all', 'speed' or 'memory'"):
        table.build("offload", rows, "time")


def test_files_hold_plain_numbers_and_a_page(tmp_path):
    table.write("offload", [done("a"), RowRecord("b", KILLED, "why | not")], tmp_path)
    first, second = csv.DictReader((tmp_path / "table.csv").open())
    assert first["process tree peak (MiB)"] == "1024.0" and first["GPU peak (MiB)"] == "" and first["cause"] == ""
    assert second["status"] == "killed" and second["cause"] == "why | not"
    page = (tmp_path / "table.md").read_text()
    assert page.startswith("# offload\n\n| row | status |") and page.endswith("- b: killed: why | not\n")
    assert len({line.count(" | ") for line in page.splitlines()[2:6]}) == 1


def test_a_notebook_gets_html():
    assert "<table>" in table.build("offload", [done("a")])._repr_mimebundle_()["text/html"]
