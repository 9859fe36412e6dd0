"""A matrix is saved after every row, continues where it stopped, and survives rows that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from tests.support.bench_records import leave_run
from tutorial_lib import launch
from tutorial_lib.bench import Matrix, figures, run_matrix
from tutorial_lib.bench import matrix as matrix_module
from tutorial_lib.bench.progress import SilentProgress
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch import Interrupted, WorkerError

ROWS = ("stage-1", "stage-2", "stage-3")


class Runs:
    """Stand-in for ``launch.run``: writes a run's files, or raises the error given here for a row."""

    def __init__(self, **failing: BaseException) -> None:
        self.failing = {name.replace("_", "-"): error for name, error in failing.items()}
        self.began: list[str] = []
        self.kept: list[list[str]] = []

    def __call__(self, config: Config, *, on_rows=None):
        self.began.append(config.run.name)
        self.kept.append(statuses(Matrix.read(config.directory.parents[1])))
        if config.run.name in self.failing:
            raise self.failing[config.run.name]
        return leave_run(config)


def statuses(matrix: Matrix) -> list[str]:
    return [row.status for row in matrix.rows]


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Skip the figures, because drawing four of them takes a second, and ``test_figures.py`` tests them."""
    monkeypatch.setattr(figures, "write", lambda *arguments: [])


@pytest.fixture
def config(tmp_path):
    return Config.create("cpu", name="m", storage=str(tmp_path), steps=5)


def run(config: Config, runs: Runs, **options) -> Matrix:
    return run_matrix("zero-stages", config, rows=ROWS, run=runs, sample_interval=0.1, **options)


def test_every_row_is_a_run_of_its_own_and_saved_when_it_ends(config):
    runs = Runs()
    matrix = run(config, runs)
    assert runs.began == list(ROWS)
    assert runs.kept == [["not run"] * 3, ["done", "not run", "not run"], ["done", "done", "not run"]]
    assert Matrix.read(matrix.path) == matrix and statuses(matrix) == ["done"] * 3
    for stage in (1, 2, 3):
        kept = Config.from_json((matrix.path / "rows" / f"stage-{stage}" / "config.json").read_text())
        assert kept.engine.zero_stage == stage and kept.run.measure
    assert {"matrix.json", "table.csv", "table.md"} <= {path.name for path in matrix.path.iterdir()}


def test_the_default_number_of_rows_is_a_setting_of_the_matrix(config, caplog):
    """All rows use these numbers of examples, so a matrix with different numbers is never continued."""
    matrix = run(config.override(engine="trainer", dataset="embedded/qa"), Runs())
    assert (matrix.settings["max_examples"], matrix.settings["max_eval_examples"]) == (500, 50)
    assert caplog.text.count("as the ZeRO workshop does") == 1


def test_speed_leaves_out_unusual_steps(config):
    row = run(config, Runs()).rows[0]
    assert row.step_seconds == 0.4 and row.samples_per_second == pytest.approx(8 / 0.4)
    assert row.train_seconds == pytest.approx(3.0 + 0.8 + 3 * 0.4)
    assert row.process_tree.peak > 0 and row.gpu is None


@pytest.mark.parametrize(("device", "is_predicted"), [("NVIDIA H200", True), ("cpu", False)])
def test_the_step_of_a_known_gpu_is_predicted(config, device, is_predicted):
    def on_device(config: Config, *, on_rows=None):
        left = leave_run(config)
        ranks = [{**rank, "device": device, "ranks_on_node": 2} for rank in left.result["ranks"]]
        return leave_run(config, ranks=ranks)

    matrix = run_matrix("zero-stages", config.override(dp=2), rows=["stage-2"], run=on_device, sample_interval=0.1)
    assert (matrix["stage-2"].predicted_step_seconds is not None) is is_predicted
    assert Matrix.read(matrix.path) == matrix


def test_a_matrix_from_before_times_were_predicted_can_be_read(config):
    matrix = run(config, Runs())
    file = matrix.path / "matrix.json"
    content = json.loads(file.read_text())
    for row in content["rows"]:
        del row["predicted_step_seconds"]
    file.write_text(json.dumps(content))
    assert Matrix.read(matrix.path) == matrix


def test_checkpoints_of_finished_rows_are_deleted_unless_kept(config):
    for keep in (False, True):
        matrix = run(config.override(name=f"keep-{keep}"), Runs(), keep_checkpoints=keep)
        assert (matrix.path / "rows" / "stage-1" / "checkpoints").exists() is keep


def test_a_failed_row_has_its_reason_and_the_next_row_runs(config):
    killed = WorkerError(
        "Rank 0 ended with exit code -9 and left no traceback: it was killed, perhaps for lack of memory.\nx"
    )
    matrix = run(config, Runs(stage_1=killed, stage_2=WorkerError("Rank 0 failed with MemoryError: \n\ntraceback")))
    assert statuses(matrix) == ["killed", "out of memory", "done"]
    assert matrix["stage-1"].cause == str(killed).splitlines()[0]
    assert "killed, perhaps for lack of memory" in (matrix.path / "table.md").read_text()
    assert "killed, perhaps for lack of memory" in (matrix.path / "table.csv").read_text()


def test_a_second_call_runs_missing_rows_and_retries_failed_ones_if_asked(config):
    run(config, Runs(stage_2=WorkerError("Rank 0 failed with ValueError: no")))
    again = Runs()
    assert statuses(run(config, again)) == ["done", "failed", "done"] and again.began == []
    assert statuses(run(config, again, retry=True)) == ["done"] * 3 and again.began == ["stage-2"]


def test_a_matrix_can_be_extended_with_more_rows(config):
    run(config, Runs())
    runs = Runs()
    matrix = run_matrix("zero-stages", config, run=runs)
    assert runs.began == ["baseline", "stage-0"]
    assert [row.name for row in matrix.rows] == [*ROWS, "baseline", "stage-0"]


def test_an_interrupt_keeps_what_is_there_and_the_row_starts_again(config):
    with pytest.raises(
        Interrupted, match="stopped in row 'stage-2', which will start over; 1 of 3 rows are done and kept"
    ):
        run(config, Runs(stage_2=KeyboardInterrupt()))
    path = config.directory
    assert statuses(Matrix.read(path)) == ["done", "stopped", "not run"]
    (path / "rows" / "stage-2").mkdir(exist_ok=True)
    (path / "rows" / "stage-2" / "half-a-run").touch()
    assert statuses(run(config, Runs())) == ["done"] * 3
    assert not (path / "rows" / "stage-2" / "half-a-run").exists()


def test_an_interrupt_while_the_old_files_of_a_row_are_removed_is_an_interrupt_like_any_other(config, monkeypatch):
    def interrupted(path, **_options):
        raise KeyboardInterrupt

    run(config, Runs(stage_2=ValueError("failed")))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(Interrupted, match="stopped in row 'stage-2', which will start over"):
            run(config, Runs(), retry=True)
    assert statuses(Matrix.read(config.directory)) == ["done", "stopped", "done"]


def test_a_run_that_stopped_on_a_signal_interrupts_the_matrix(config):
    def stopped(config: Config, *, on_rows=None):
        return leave_run(config, status="stopped", stopped_by="SIGTERM")

    with pytest.raises(Interrupted):
        run(config, stopped)
    assert statuses(Matrix.read(config.directory))[0] == "stopped"


def test_a_signal_between_two_rows_interrupts(config):
    class Signalled(SilentProgress):
        """Progress that a scheduler's signal interrupts."""

        def end(self, record):
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="1 of 3 rows are done"):
        run(config, Runs(), progress=Signalled())
    assert signal.getsignal(signal.SIGTERM) is handler
    assert statuses(Matrix.read(config.directory)) == ["done", "not run", "not run"]


def test_a_signal_before_the_first_row_leaves_no_handler_behind(config, monkeypatch):
    install, handler = signal.signal, signal.getsignal(signal.SIGTERM)
    terminations = iter([signal.SIGTERM])

    def interrupted(number, handler):
        replaced = install(number, handler)
        for number in terminations:
            signal.raise_signal(number)
        return replaced

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, Runs())
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_too_late_to_stop_a_row_keeps_it_and_starts_no_other(config, number):
    """The run completes all the same, and for Ctrl-C its launch ends with an Interrupted."""

    def completed(config: Config, *, on_rows=None):
        done = replace(leave_run(config), was_signalled=True)
        if number == "SIGINT":
            raise Interrupted("run 'stage-1' had completed when the interrupt came.", [done])
        return done

    with pytest.raises(Interrupted, match=r"stopped after row 'stage-1' \(done\); 1 of 3 rows are done"):
        run(config, completed)
    assert statuses(Matrix.read(config.directory)) == ["done", "not run", "not run"]
    assert not (config.directory / "rows" / "stage-1" / "checkpoints").exists()


def test_a_signal_ends_the_matrix_even_if_the_row_then_fails(config):
    failed = WorkerError("Rank 0 ended with exit code -9.")
    failed.was_signalled = True
    with pytest.raises(Interrupted, match=r"stopped after row 'stage-1' \(killed\); 0 of 3 rows are done"):
        run(config, Runs(stage_1=failed))
    assert statuses(Matrix.read(config.directory)) == ["killed", "not run", "not run"]


def test_a_signal_while_a_completed_row_is_measured_keeps_the_row(config, monkeypatch):
    measure, calls = matrix_module.measure_row, []

    def signalled(*arguments, **options):
        calls.append(None)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return measure(*arguments, **options)

    monkeypatch.setattr(matrix_module, "measure_row", signalled)
    with pytest.raises(Interrupted, match=r"stopped after row 'stage-1' \(done\); 1 of 3 rows are done"):
        run(config, Runs())


@pytest.mark.parametrize("where", ["after row 'stage-3' \\(done\\)", "before its first row"])
def test_a_signal_while_the_figures_are_drawn_interrupts(config, monkeypatch, where):
    if where == "before its first row":
        run(config, Runs())  # the next call has no row left to run
    monkeypatch.setattr(figures, "write", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match=f"stopped {where}; 3 of 3 rows are done and kept"):
        run(config, Runs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 6}, r"were run with steps=5 \(now 6\)"),
        ({"seq_length": 32}, r"seq_length=128 \(now 32\)"),
        ({"resume": "never"}, "is already a matrix"),
    ],
)
def test_rows_with_other_settings_are_not_mixed(config, change, message):
    run(config, Runs())
    with pytest.raises(ConfigError, match=message):
        run(config.override(**change), Runs())


def test_another_experiment_or_a_run_of_this_name_is_refused(config):
    run(config, Runs())
    with pytest.raises(ConfigError, match="is a zero-stages matrix, so it cannot continue as offload"):
        run_matrix("offload", config, run=Runs())
    leave_run(config.override(name="a-run"))
    with pytest.raises(ConfigError, match="a-run is a run"):
        run(config.override(name="a-run"), Runs())


@pytest.mark.parametrize(
    ("flat", "message"), [({"launcher": "none", "dp": 1}, "launcher='none'"), ({"steps": 1}, "steps=1 leaves nothing")]
)
def test_settings_that_every_row_would_refuse_are_refused_before_any_row(config, flat, message):
    with pytest.raises(ConfigError, match=message):
        run(config.override(**flat), Runs())
    assert not config.directory.exists()


@pytest.mark.parametrize(("experiment", "threads"), [("weak-scaling", "2"), ("zero-stages", None)])
def test_in_scaling_experiments_every_rank_has_the_same_number_of_threads(config, monkeypatch, experiment, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("tutorial_lib.bench.matrix.usable_cores", lambda: 8)
    seen = []

    def run(row: Config, *, on_rows=None):
        seen.append(os.environ.get("OMP_NUM_THREADS"))
        return leave_run(row)

    run_matrix(experiment, config, run=run)
    assert set(seen) == {threads} and "OMP_NUM_THREADS" not in os.environ


def test_ranks_that_share_cores_are_noted(config, monkeypatch):
    monkeypatch.setattr("tutorial_lib.bench.record.usable_cores", lambda: 2)
    rows = run_matrix("strong-scaling", config, run=Runs()).rows
    assert [row.note for row in rows] == [None, None, "4 processes share 2 cores"]


def test_a_sample_interval_of_0_is_refused(config):
    with pytest.raises(ConfigError, match="sample_interval is 0"):
        run_matrix("zero-stages", config, run=Runs(), sample_interval=0)


def test_if_no_row_can_run_here_the_first_rows_reason_is_raised(config):
    refused = {name.replace("-", "_"): ConfigError("This run needs 90.0 GB of memory.") for name in ROWS}
    with pytest.raises(ConfigError, match=r"No row can run here. stage-1: This run needs 90.0 GB"):
        run(config, Runs(**refused))
    assert statuses(Matrix.read(config.directory)) == ["refused"] * 3


def test_a_second_bench_in_the_same_matrix_is_refused(config):
    errors = []

    def run_again(row: Config, *, on_rows=None):
        try:
            run(config, Runs())
        except ConfigError as error:
            errors.append(str(error))
        return leave_run(row)

    run(config, run_again)
    assert len(errors) == 3 and "Another process is running" in errors[0]


def test_rows_that_another_bench_finished_just_before_this_one_began_are_kept_and_not_run_again(config, monkeypatch):
    other, own = Runs(), Runs()
    run_matrix("zero-stages", config, rows=ROWS[:1], run=other)

    def finish_two_rows(config):
        monkeypatch.setattr(launch, "warm_up", lambda config: None)
        run_matrix("zero-stages", config, rows=ROWS[1:], run=other)

    monkeypatch.setattr(launch, "warm_up", finish_two_rows)
    matrix = run_matrix("zero-stages", config, rows=("stage-2", "baseline"), run=own)
    assert other.began == list(ROWS) and own.began == ["baseline"]
    assert [row.name for row in matrix.rows] == [*ROWS, "baseline"] and statuses(matrix) == ["done"] * 4


def test_an_unreadable_matrix_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no matrix\.json"):
        Matrix.read(tmp_path)
    (tmp_path / "matrix.json").write_text(json.dumps({"rows": []})[:-1])
    with pytest.raises(ConfigError, match=r"matrix\.json cannot be read"):
        Matrix.read(tmp_path)
