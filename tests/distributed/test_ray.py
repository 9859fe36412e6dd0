"""Ray Train runs the same training function, with the same numbers, resumes and errors, and without noise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress

import psutil
import pytest

from tests.distributed.cases import interruption
from tests.distributed.cases.interruption import END, STOP
from tests.support.launching import NEEDS_WARM_SERVER, ROOT, interrupt_when, wait_until
from tutorial_lib import checkpoint, launch
from tutorial_lib.config import ConfigError
from tutorial_lib.lab.scripts import train_zero
from tutorial_lib.launch.ray import cluster as ray_cluster
from tutorial_lib.launch.ray import train as ray_train
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer.signals import output_to


@pytest.fixture(scope="module")
def cluster(directory):
    """Start one cluster for the entire module, because starting it takes longer than any run in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with ray_train.session(on_ray(directory)):
            yield
    left = signal.getsignal(signal.SIGINT)
    assert left is signal.default_int_handler, "Ctrl-C would still go to the controller of Ray's own trainer"


def on_ray(directory, **changes):
    return interruption.uninterrupted(directory, "zero1", name="ray", launcher="ray", **changes)


@pytest.fixture(scope="module")
def runs(cluster, directory):
    """Stop a run and start it again under the same name, and return both starts, all rows and the output."""
    shown, rows, starts = directory / "shown", [], []
    for stop in (STOP, None):
        with shown.open("a") as file, redirect_stdout(file), redirect_stderr(file), output_to(shown):
            starts.append(launch.run(on_ray(directory, stop_after=stop), on_rows=rows.extend))
    return starts, rows, shown.read_text()


def test_a_resumed_run_on_ray_matches_local_processes(runs, observed):
    (first, second), _, _ = runs
    local = observed(2, "uninterrupted.zero1")
    assert (first.result["status"], second.result["status"]) == ("stopped", "completed")
    assert second.result["resumed_from"] == STOP
    for key in ("step", "loss", "grad_norm", "tokens", "epoch", "lr"):
        assert [row[key] for row in second.rows] == [row[key] for row in local.rows], key


def test_local_processes_continue_a_run_that_ray_began(cluster, directory, observed):
    begun = on_ray(directory).override(name="ray-begun")
    launch.run(begun.override(stop_after=STOP))
    run = launch.run(begun.override(launcher="local"))
    assert run.result["resumed_from"] == STOP
    assert [row["loss"] for row in run.rows] == [row["loss"] for row in observed(2, "uninterrupted.zero1").rows]


def test_runs_on_ray_match_local_processes(cluster, directory, observed):
    """Run a 1 x 2 and a 2 x 1 grid on the same two workers."""
    kinds = ("1x2-zero2", "fsdp-full")
    configs = [interruption.uninterrupted(directory, kind, name=f"ray-{kind}", launcher="ray") for kind in kinds]
    for kind, run in zip(kinds, launch.run_all(configs), strict=True):
        local = observed(2, f"uninterrupted.{kind}")
        for key in ("step", "loss", "grad_norm", "tokens", "epoch", "lr"):
            assert [row[key] for row in run.rows] == [row[key] for row in local.rows], (kind, key)


def test_rows_are_handed_on_once(runs):
    (_, second), rows, _ = runs
    assert rows == second.rows


def test_workers_write_to_files_and_not_to_the_notebook(runs):
    (_, second), _, shown = runs
    assert shown == ""
    assert all(second.directory.log_file(rank).is_file() for rank in range(2))


def test_ray_registers_the_checkpoints(runs, cluster):
    """Ray registers the checkpoints without copying them: its own directory holds only a list."""
    import ray.train

    (_, second), _, _ = runs
    newest = checkpoint.latest(second.directory)
    result = ray.train.Result.from_path(str(second.directory.path))
    assert result.checkpoint.path == str(newest)
    assert result.metrics["step"] == END
    assert len(list(second.directory.path.rglob("manifest.json"))) == 2


def test_rays_own_trainer_takes_the_loop_that_a_reader_writes(cluster, directory, runs):
    """``notebooks/scripts/train_zero.py`` calls ``TorchTrainer(...).fit()``. The run stops once and resumes exactly."""
    import ray.train
    from ray import cloudpickle

    (_, second), _, _ = runs
    cloudpickle.register_pickle_by_value(train_zero)  # Ray does this by itself for a loop in a notebook or a script
    losses = []
    for stop in (STOP, None):
        config = on_ray(directory, stop_after=stop).override(name="ray-own")
        losses += train_zero.main(config)
    assert losses == [row["loss"] for row in second.rows]
    result = ray.train.Result.from_path(str(config.directory))
    assert result.checkpoint.path == str(checkpoint.latest(RunDirectory(config.directory)))
    assert result.metrics == {"step": END, "loss": losses[-1]}


ASK = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1]).internal_kv_get(b'key', None); print('answered')"


@pytest.mark.parametrize(
    ("token", "answer"),
    [(ray_cluster.TOKEN, "answered"), ("0" * 64, "InvalidAuthToken"), (None, "RAY_AUTH_TOKEN")],
    ids=["this-process", "another", "none"],
)
def test_the_cluster_answers_only_with_this_processs_token(cluster, tmp_path, token, answer):
    """By default, every cluster would share the token that Ray keeps in the home directory."""
    import ray

    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    environment.pop("RAY_AUTH_TOKEN", None)
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    asked = subprocess.run(
        [sys.executable, "-c", ASK, ray.get_runtime_context().gcs_address],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer in asked.stdout + asked.stderr


def test_a_failing_ranks_own_traceback_is_what_the_user_sees(cluster, directory, capfd):
    began = time.monotonic()
    with pytest.raises(launch.WorkerError) as error:
        failing = on_ray(directory).override(name="ray-failing")
        launch.run_all([failing], worker="tests.distributed.workers.failing_on_ray")
    assert str(error.value).startswith("Rank 1 of run 'ray-failing' failed with ValueError: of rank 1 alone\n")
    assert 'raise ValueError("of rank 1 alone")' in str(error.value)
    assert time.monotonic() - began < 60
    assert "".join(capfd.readouterr()) == "", "the error must be raised, and not be printed as well"


def actors_of_a_fit(titles=("ray::Train", "ray::RayTrain")):
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if " ".join(process.cmdline()).startswith(titles):
                found.append(process)
    return found


@NEEDS_WARM_SERVER
def test_an_interrupt_leaves_no_worker_that_trains_on(cluster, directory):
    before = {actor.pid for actor in actors_of_a_fit()}  # an earlier test leaves Ray Train's controller running

    def interrupt(rows):
        actors = [actor for actor in actors_of_a_fit() if actor.pid not in before]
        assert len(actors) == 3, "a controller and two workers"
        if sys.platform == "linux":
            assert all("tutorial_lib.launch.ray.server" in actor.parent().cmdline() for actor in actors), "forked"
        raise KeyboardInterrupt

    config = on_ray(directory).override(name="ray-interrupted", steps=1000)
    with pytest.raises(KeyboardInterrupt):
        launch.run(config, on_rows=interrupt)
    assert not actors_of_a_fit()


def test_one_interrupt_saves_and_ends_the_call(cluster, directory):
    config = on_ray(directory).override(name="ray-interrupted-once", steps=1000)
    run = RunDirectory(config.directory)
    striker = interrupt_when(run.metrics_file.exists)
    with pytest.raises(launch.Interrupted, match=r"stopped at step \d+ of 1000 and was saved"):
        launch.run(config)
    striker.join()
    assert run.result()["stopped_by"] == "request"
    assert checkpoint.latest(run).name == f"step-{run.result()['step']:08d}"
    # The controller itself ends when Python drops its last reference, which may be later.
    wait_until(lambda: not actors_of_a_fit(("ray::RayTrainWorker",)), 20)


def test_a_stop_before_the_first_worker_has_begun_ends_the_start(cluster, directory):
    config = on_ray(directory).override(name="ray-early")
    run = RunDirectory(config.directory)
    began = time.monotonic()
    run.create()
    ray_train.launch([config], lambda: run.stop_file.write_text("now"))
    assert not run.result_file.exists()
    assert time.monotonic() - began < 10
    assert not actors_of_a_fit()
    run.stop_file.unlink()
    assert launch.run(config).result["status"] == "completed", "the stopped start must free its slots"


def test_more_workers_than_the_cluster_has_is_an_error_at_once(cluster, directory, monkeypatch):
    monkeypatch.setattr(launch.checks, "available_memory_gb", lambda: 1000.0)
    began = time.monotonic()
    many = on_ray(directory).override(name="ray-many", dp=256, global_batch=256)
    with pytest.raises(
        ConfigError, match=r"256 workers need 256 CPUs, but the Ray cluster has \d+\. Write a smaller dp"
    ):
        launch.run(many)
    assert time.monotonic() - began < 10


def test_a_gpu_where_the_cluster_has_none_is_an_error_at_once(cluster, directory):
    import ray

    if ray.cluster_resources().get("GPU", 0) >= 2:
        pytest.skip("this machine has the GPUs that are asked for")
    with pytest.raises(ConfigError, match=r"2 workers need 2 GPUs, but the Ray cluster has \d.*or device='cpu'"):
        launch.run(on_ray(directory).override(name="ray-gpu", device="cuda"))
