"""Resume: a run continues exactly or is refused, and never restarts silently.

These tests run the torch engine in one process. ``tests/distributed`` has the same for other engines and more ranks.
"""

import json
import shutil

import pytest

from tests.support.torch_runs import STEPS, assert_same, config
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import manifest
from tutorial_lib.config import ConfigError
from tutorial_lib.engine.single import TorchEngine
from tutorial_lib.records import RunDirectory


@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_stopped_once_continues_exactly(uninterrupted, model, tmp_path, stop):
    """The run stops within an epoch, or at its end. The next test stops after every step."""
    first = launch.run(config(tmp_path, model=model, stop_after=stop))
    assert (first.result["status"], first.result["step"]) == ("stopped", stop)
    second = launch.run(config(tmp_path, model=model))
    assert (second.result["status"], second.result["resumed_from"]) == ("completed", stop)
    assert_same(second, uninterrupted)


def test_a_run_may_be_stopped_at_every_step(uninterrupted, model, tmp_path):
    for stop in (*range(1, STEPS), None):
        run = launch.run(config(tmp_path, model=model, stop_after=stop))
        assert run.result["resumed_from"] == ((stop or STEPS) - 1 or None)
    assert_same(run, uninterrupted)


def test_steps_may_be_raised_where_the_schedule_does_not_depend_on_them(uninterrupted, model, tmp_path):
    launch.run(config(tmp_path, model=model, steps=4))
    assert_same(launch.run(config(tmp_path, model=model)), uninterrupted)


def test_a_finished_run_started_again_trains_nothing(uninterrupted):
    again = launch.run(uninterrupted.config)
    assert (again.result["status"], again.result["step"]) == ("completed", STEPS)
    assert again.rows == uninterrupted.rows


def test_with_resume_never_a_run_that_exists_is_refused(interrupted):
    with pytest.raises(ConfigError, match=r"step-00000004, and resume='never'.*another name"):
        launch.run(interrupted.config.override(resume="never", stop_after=None))
    assert [row["step"] for row in interrupted.directory.rows()] == [1, 2, 3, 4]


def test_with_resume_never_a_new_run_starts(model, tmp_path):
    assert launch.run(config(tmp_path, model=model, steps=1, resume="never")).result["status"] == "completed"


def test_a_checkpoint_of_format_1_is_still_read(interrupted, uninterrupted):
    """Format 1 has no hash of model and tokenizer, so nothing is compared."""
    path = checkpoint.directory_of(interrupted.directory, 4)
    trainer = json.loads((path / "trainer.json").read_text())
    del trainer["identity"]
    (path / "trainer.json").write_text(json.dumps(trainer | {"format": 1}))
    listed = json.loads((path / "manifest.json").read_text())
    listed["files"]["trainer.json"] = manifest.file_entry(path / "trainer.json")
    (path / "manifest.json").write_text(json.dumps(listed | {"format": 1}))
    run = launch.run(interrupted.config.override(stop_after=None))
    assert (run.result["resumed_from"], run.result["left_out"]) == (4, [])
    assert_same(run, uninterrupted)


@pytest.mark.parametrize(("what", "async_save"), [("loss", False), ("norm", False), ("norm", True)])
def test_a_run_that_diverges_stops_and_names_the_newest_checkpoint(model, tmp_path, monkeypatch, what, async_save):
    from tutorial_lib import trainer

    if what == "loss":
        # The first update throws the weights out of range, which the loss of the second step shows.
        settings, step = config(tmp_path, model=model, checkpoint_every=1, learning_rate=1e30, warmup_steps=0), 2
    else:
        settings, step = config(tmp_path, model=model, checkpoint_every=1, async_save=async_save), 3
        norms = iter([1.0, 1.0, float("nan")])
        update = TorchEngine.step
        monkeypatch.setattr(TorchEngine, "step", lambda self: update(self) and next(norms))
    with pytest.raises(trainer.NonFiniteLoss) as error:
        launch.run(settings)
    assert f"At step {step} the " in str(error.value)
    newest = checkpoint.directory_of(RunDirectory(settings.directory), step - 1)
    assert f"newest checkpoint is {newest}." in str(error.value)
    assert checkpoint.latest(RunDirectory(settings.directory)) == newest
    checkpoint.verify(newest)
    assert len(RunDirectory(settings.directory).rows()) == step - 1


def test_a_warm_up_longer_than_the_epochs_is_refused_before_the_first_step(model, tmp_path):
    settings = config(tmp_path, model=model, steps=None, epochs=1, warmup_steps=4)
    with pytest.raises(ConfigError, match="warmup_steps=4 is longer than the whole run of 3"):
        launch.run(settings)
    assert not RunDirectory(settings.directory).rows()


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"steps": 4}, "steps=4 is fewer than the 5 steps that run 'run' has done. Write at least that many"),
        ({"steps": None, "epochs": 1}, "epochs=1 makes 3 steps, fewer than the 5 steps that run 'run' has done"),
    ],
)
def test_a_run_cannot_be_shortened_to_less_than_it_has_done(model, tmp_path, length, message):
    settings = config(tmp_path, model=model, steps=5, schedule="constant")
    launch.run(settings)
    with pytest.raises(ConfigError, match=message):
        launch.run(settings.override(**length))
    assert launch.run(settings).result["num_steps"] == 5


def test_divergence_before_any_checkpoint_says_so(model, tmp_path):
    from tutorial_lib import trainer

    with pytest.raises(trainer.NonFiniteLoss, match="No checkpoint had been saved"):
        launch.run(config(tmp_path, model=model, learning_rate=1e30, warmup_steps=0))


def test_nan_weights_are_distinguished_from_divergence(model, tmp_path):
    from safetensors.torch import load_file, save_file

    from tutorial_lib import trainer

    directory = shutil.copytree(model, tmp_path / "nan")
    tensors = load_file(directory / "model.safetensors")
    next(iter(tensors.values()))[:] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(trainer.NonFiniteLoss, match="the loss is nan, so it comes from the weights of") as told:
        launch.run(config(tmp_path, model=str(directory)))
    assert "learning_rate" not in str(told.value)
