"""Error table of the planner: predictions stay within bounds, and docs/planner-errors.md shows the current table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.theory import errors, gpu_runs
from tests.theory.published import FALCON, ROWS, Published
from tutorial_lib.cli import main
from tutorial_lib.cli.plan_check import compare_predictions
from tutorial_lib.config import Config
from tutorial_lib.engine.deepspeed.config import apply_file
from tutorial_lib.engine.predictions import predict_step_peak
from tutorial_lib.theory.cost import OFFLOADED_RUN, SLOWEST_SMALL_RUN

MODELLED = [run for run in ROWS if not run.not_modelled and run.layout.offload == "none"]
LARGE = [run for run in MODELLED if run.workload.num_params >= 1e9]


@pytest.mark.parametrize("run", [run for run in ROWS if run.memory], ids=lambda run: run.name)
def test_memory_of_published_runs(run: Published) -> None:
    error = errors.errors_of(run).memory_error
    assert error is not None and abs(error) <= 0.12


@pytest.mark.parametrize("run", LARGE, ids=lambda run: run.name)
def test_speed_of_published_runs_of_large_models(run: Published) -> None:
    assert abs(errors.errors_of(run).speed_error) <= 0.20


def test_small_models_are_slower_than_predicted() -> None:
    """Kernels of small models reach less of the peak than assumed. Plans name the largest factor."""
    small = [errors.errors_of(run).speed_error for run in MODELLED if run not in LARGE]
    assert len(small) == 4 and min(small) > 0
    assert math.ceil(1 + max(small)) == SLOWEST_SMALL_RUN
    assert sum(error <= errors.TIME_GOAL for error in small) == 2  # those with the most unfused attention


def test_offload_is_a_known_error_of_the_time_model() -> None:
    """Plans warn about it, with the factor of this row."""
    (offloaded,) = [run for run in ROWS if run.layout.offload != "none"]
    without = replace(offloaded, layout=replace(offloaded.layout, offload="none")).predict()
    seconds = offloaded.predict().seconds
    assert without.seconds == pytest.approx(2.86, rel=0.05)
    assert round(13.70 / seconds, 1) == OFFLOADED_RUN
    assert errors.errors_of(offloaded).is_judged and f"{seconds - without.seconds:.1f} s" in offloaded.why


def test_the_page_explains_what_its_rows_leave_out() -> None:
    found = [errors.errors_of(run) for run in ROWS]
    layouts = [e.run.layout for e in found if e.is_judged]
    assert all(layout.tp == layout.cp == layout.pp == 1 for layout in layouts)
    assert sum(layout.offload != "none" for layout in layouts) == 1
    low = sum(e.memory_error < 0 for e in found if e.memory_error is not None)
    assert f"{low} of the 12 predictions are too low" in errors.page()
    assert all("float8" in run.name for run in ROWS if "float8" in run.not_modelled)


def test_the_page_says_what_no_row_checks() -> None:
    page = errors.page()
    assert f"{FALCON.not_modelled}.\nSo this row is no check" in page
    assert "anything about context parallelism by Ulysses, LoRA, 8-bit or bf16 moments" in page
    assert "and the speed of\n  hybrid sharding, tensor parallelism" in page
    assert "| LoRA | 0 | 0 | 0 |" in page and "| offload | 0 | 1 | 12 |" in page and "| pipelines | 2 | 0 | 0 |" in page


def test_the_page_shows_the_case_that_differs_from_an_experts_answer() -> None:
    text = errors.page().partition("## 4. An answer")[2]
    assert text.count("% slower: ") == 3 and "dp 64 x tp 8 |" in text


def test_our_own_gpu_runs() -> None:
    workshop, fsdp = list(gpu_runs.workshop_runs()), list(gpu_runs.fsdp_runs())
    assert len(workshop) == 19 and len(fsdp) == 18
    for run in workshop:
        assert run.states is not None and run.states[0] == pytest.approx(run.states[1], rel=1e-6), run
        assert 0.8 < run.times_too_fast < 2.5, run  # kernels of small models are slower than assumed
    updates = list(gpu_runs.update_errors())
    assert len(updates) == 9 and max(map(abs, updates)) < 0.01
    for run in (*workshop, *fsdp):
        assert run.peaks_at_update or abs(run.peak_error) < 0.01, run
    assert [run.name for run in fsdp if run.peaks_at_update] == [
        "micro-batch 2",
        *(f"micro-batch {size}, recomputed" for size in (2, 4, 8, 16)),
    ]
    assert all(abs(run.seconds[0] / run.seconds[1] - 1) < 0.2 for run in fsdp)
    fitted = [run for run in (*workshop, *fsdp) if run.is_fitted]
    assert len(fitted) == 16 and all(abs(run.seconds[0] / run.seconds[1] - 1) < 0.2 for run in fitted)


def test_a_small_batch_of_a_large_model_peaks_at_the_norm_of_its_embedding() -> None:
    """docs/workshop.md quotes this record. Nothing else in a step is as large as the embedding's gradient."""
    record = json.loads((gpu_runs.DIRECTORY.parent / "bloom-560m-two-steps.json").read_text())
    settings = {key: record["settings"][key] for key in ("model", "seq_length", "precision", "bucket_size", "dp")}
    config = Config.create(
        "cpu", **settings, random_init=True, global_batch=1, zero_stage=2, offload="optimizer"
    )  # fmt: skip
    assert predict_step_peak(config) == pytest.approx(record["rows"][0]["peak_bytes"], rel=0.002)


def test_our_own_runs() -> None:
    for config, (states, peak, sent) in errors.own_runs():
        assert abs(states.error) <= 0.01 and abs(sent.error) <= 0.01, config
        assert abs(peak.error) <= 0.10, config


def test_every_published_run_names_its_source() -> None:
    assert all(run.source and run.speed for run in ROWS)
    assert len({(run.name, run.source, run.speed) for run in ROWS}) == len(ROWS)


def test_the_page_shows_the_table() -> None:
    assert errors.PAGE.read_text(encoding="utf-8") == errors.page(), "run `python -m tests.theory.errors`"


@pytest.mark.parametrize(
    ("stated", "share"),
    [({"use_multi_rank_bucket_allreduce": False}, 0.5), ({}, 1.0), ({"use_multi_rank_bucket_allreduce": True}, 1.0)],
)
def test_a_check_reads_how_the_deepspeed_file_reduces(tmp_path: Path, stated: dict[str, bool], share: float) -> None:
    """Reduce-scatter sends half of an all-reduce, so 1 + 1 instead of 2 + 1 elements are sent per parameter."""
    ds_file = tmp_path / "ds.json"
    ds_file.write_text(json.dumps({"zero_optimization": {"stage": 2, **stated}}))
    row = next(r for r in json.loads(errors.MEASURED.read_text()) if r["settings"].get("zero_stage") == 2)
    plain = compare_predictions(Config.create("cpu", **row["settings"]), [row["measured"]])
    config = apply_file(Config.create("cpu", **row["settings"], deepspeed=str(ds_file)))
    states, _, sent = compare_predictions(config, [row["measured"]])
    assert states.predicted == plain[0].predicted
    assert sent.predicted == pytest.approx(plain[2].predicted * (1 + 2 * share) / 3)


def test_a_check_counts_the_offloaded_gradients_of_a_split_model_once() -> None:
    """Full gradients wait on the device for the last of two micro-batches, before the host gets a rank's share."""
    config = Config.create(
        "cpu", engine="fsdp", model="embedded/qwen2", dp=2, tp=2, offload="all", global_batch=8, micro_batch=2,
        seq_length=32,
    )  # fmt: skip
    measured = {
        "state_bytes": {"total": 4_374_720},
        "peak_bytes": {"cpu": 5_673_624},
        "traffic": {"wire_bytes": 5_161_152},
    }
    states, peak, sent = compare_predictions(config, [measured])
    assert states.error == sent.error == 0 and abs(peak.error) < 0.02


def test_a_run_is_checked_from_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads(errors.MEASURED.read_text(encoding="utf-8"))[0]
    config = Config.create("cpu", **row["settings"])
    (tmp_path / "config.json").write_text(config.to_json())
    records = [{"measured": row["measured"], "ranks_on_node": 2}] * 2
    (tmp_path / "result.json").write_text(json.dumps({"ranks": records}))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "seconds": 0.5}}\n' for n in range(5)))
    assert main(["plan", "--check", str(tmp_path), "--json"]) == 0
    states, peak, sent = json.loads(capsys.readouterr().out)
    assert states["predicted"] == states["measured"] == row["measured"]["state_bytes"]["total"]
    assert abs(peak["error"]) < 0.1 and sent["error"] == 0
    assert main(["plan", "--check", str(tmp_path)]) == 0
    assert "model states, bytes" in capsys.readouterr().out
    assert main(["plan", "--check", str(tmp_path), "--gpu", "h100", "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)[3]
    assert seconds["measured"] == 0.5
    (tmp_path / "result.json").write_text(json.dumps({"ranks": [{**each, "ranks_on_node": 1} for each in records]}))
    assert main(["plan", "--check", str(tmp_path), "--gpu", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[3]["predicted"] > seconds["predicted"]  # the ranks are on two nodes

    assert main(["plan", "--check", str(tmp_path), "--gpu", "h100", "--efficiency", "7", "--only-here"]) == 2
    assert "Leave out --only-here, --efficiency." in capsys.readouterr().err
    assert main(["plan", "--check", str(tmp_path / "nowhere")]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["plan", "--check", str(tmp_path), "--gpu", "nope"]) == 2
    assert "gpu is 'nope'. Write one of: a100-80" in capsys.readouterr().err

    (tmp_path / "result.json").write_text(json.dumps({"ranks": [{"measured": None}]}))
    assert main(["plan", "--check", str(tmp_path)]) == 2
    assert "train it with --measure" in capsys.readouterr().err
