"""Rows of a matrix: the settings behind their names, and the settings that a matrix decides itself."""

from __future__ import annotations

import pytest

from tutorial_lib.bench import experiments
from tutorial_lib.bench.experiments import EXPERIMENTS, rows_of, workshop_name
from tutorial_lib.config import Config, ConfigError


def shape(config: Config) -> tuple:
    engine = config.engine
    return engine.name, config.parallel.dp, engine.zero_stage, engine.offload, engine.pin_memory


def test_stages_are_compared_with_one_plain_process():
    rows = rows_of("zero-stages", Config.create("cpu", dp=4))
    assert list(rows) == ["baseline", "stage-0", "stage-1", "stage-2", "stage-3"]
    assert shape(rows["baseline"])[:2] == ("torch", 1)
    assert [shape(rows[f"stage-{s}"]) for s in range(4)] == [("deepspeed", 4, s, "none", False) for s in range(4)]
    assert {config.run.global_batch for config in rows.values()} == {8}


def test_pinned_memory_is_compared_where_there_is_a_gpu():
    assert [name for name in rows_of("offload", Config.create("gpu")) if "pinned" in name] == [
        "stage-1-offload-pinned", "stage-2-offload-pinned", "stage-3-offload-pinned",
    ]  # fmt: skip
    on_cpu = rows_of("offload", Config.create("cpu"))
    assert not any("pinned" in name for name in on_cpu)
    assert [config.engine.offload for config in on_cpu.values()] == ["none", "optimizer"] * 2 + ["none", "all"]


def test_stage_0_in_fp16_is_left_out_under_the_hugging_face_trainer():
    asked = {"engine": "trainer", "precision": "fp16"}
    assert list(rows_of("zero-stages", Config.create("gpu", **asked))) == ["baseline", "stage-1", "stage-2", "stage-3"]
    assert "stage-0" in rows_of("zero-stages", Config.create("gpu", **asked | {"precision": "bf16"}))


def test_scaling_keeps_the_work_per_rank_or_the_total():
    config = Config.create("cpu", global_batch=4)
    weak, strong = (rows_of(f"{kind}-scaling", config) for kind in ("weak", "strong"))
    assert [(c.parallel.dp, c.run.global_batch) for c in weak.values()] == [(1, 4), (2, 8), (4, 16)]
    assert [(c.parallel.dp, c.run.global_batch) for c in strong.values()] == [(1, 4), (2, 4), (4, 4)]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("2ZO-1G1N", (2, "optimizer", False, 1)),
        ("2ZOP-1G1N", (2, "optimizer", True, 1)),
        ("3ZO-2G1N", (3, "all", False, 2)),
        ("1Z-8G4N", (1, "none", False, 8)),
    ],
)
def test_names_of_the_workshop_say_stage_offload_and_devices(name, meaning):
    stage, offload, pinned, dp = meaning
    expected = {"zero_stage": stage, "offload": offload, "pin_memory": pinned, "dp": dp}
    assert workshop_name(name) == expected
    assert shape(rows_of("offload", Config.create("cpu", global_batch=8), [name])[name])[1:] == (
        dp, stage, offload, pinned,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["4Z-1G1N", "2ZP-1G1N", "2Z-0G1N", "2Z-1G", "stage-2"])
def test_row_names_outside_the_workshop_have_no_workshop_name(name):
    assert workshop_name(name) is None


@pytest.mark.parametrize(
    ("experiment", "flat", "rows", "message"),
    [
        ("zero", {}, (), "There is no matrix 'zero'. Write one of: zero-stages, offload"),
        ("offload", {}, ("stage-9",), "There is no row 'stage-9'. Write one of: stage-1, stage-1-offload"),
        ("offload", {}, ("stage-1", "stage-1"), "names a row twice"),
        ("zero-stages", {"zero_stage": 2}, (), "rows of this zero-stages matrix set zero_stage"),
        ("zero-stages", {"deepspeed": "zero2"}, (), "rows of this zero-stages matrix set deepspeed"),
        ("weak-scaling", {"dp": 4}, (), "rows of this weak-scaling matrix set dp"),
        ("zero-stages", {"engine": "fsdp"}, (), "which engine='fsdp' does not have"),
        ("strong-scaling", {"global_batch": 2}, (), "Row dp-4: global_batch=2 is not a multiple of dp=4"),
        ("offload", {"steps": 4, "stop_after": 2}, (), "stop_after would leave every row unfinished"),
    ],
)
def test_settings_that_make_no_matrix_are_refused(experiment, flat, rows, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        rows_of(experiment, Config.create("cpu", **flat), rows)


def test_settings_may_be_stated_as_the_rows_have_them():
    config = Config.create("cpu", dp=2, zero_stage=2, offload="optimizer")
    assert list(rows_of("offload", config, ["2ZO-2G1N", "stage-2-offload"])) == ["2ZO-2G1N", "stage-2-offload"]


def test_settings_that_only_some_rows_use_are_accepted():
    rows = rows_of("zero-stages", Config.create("cpu", bucket_size=1000, dp=2))
    assert rows["baseline"].engine.name == "torch" and rows["stage-3"].engine.bucket_size == 1000


def test_shipped_files_have_the_stage_and_offload_of_their_rows(tmp_path):
    from tutorial_lib.engine.deepspeed.config import apply_file

    for (stage, offload, pinned), name in experiments.FILES.items():
        engine = apply_file(Config.create("cpu", deepspeed=name, dp=1)).engine
        assert (engine.zero_stage, engine.offload, engine.pin_memory) == (stage, offload, pinned)


def test_an_engine_that_takes_zero_from_files_gets_the_file_of_each_row(monkeypatch):
    monkeypatch.setattr(experiments, "FILE_ENGINES", frozenset({"deepspeed"}))
    stages = rows_of("zero-stages", Config.create("cpu"))
    assert [c.engine.deepspeed_file for c in stages.values()] == [None, "zero0", "zero1", "zero2", "zero3"]
    assert stages["baseline"].engine.name == "deepspeed" and stages["baseline"].parallel.dp == 1
    on_gpu = rows_of("offload", Config.create("gpu"))
    assert on_gpu["stage-2-offload-pinned"].engine.deepspeed_file == "zero2_cpu_offload_pinned_memory"
    assert "stage-1-offload-pinned" not in on_gpu, "the workshop has no such file"


def test_the_command_line_knows_every_matrix():
    from tutorial_lib.cli.bench import MATRICES

    assert list(MATRICES) == list(EXPERIMENTS)
