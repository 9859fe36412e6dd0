"""Damaged checkpoints, which are reported before anything is opened. The run resumes from the newest intact one."""

import json
import re

import pytest

from tests.support.damaged_files import cut_short, flip_a_bit
from tests.support.torch_runs import assert_same, make_checkpoint
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import CheckpointError, directory, manifest
from tutorial_lib.records import RunDirectory


def change_the_step(path):
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


DAMAGE = [
    ("engine/model.pt", lambda path: path.unlink(), r"engine/model\.pt is missing"),
    ("engine/optimizer.pt", cut_short, r"engine/optimizer\.pt has \d+ bytes, but \d+ were written"),
    ("engine/model.pt", flip_a_bit, r"engine/model\.pt was altered"),
    ("rank-000.pt", flip_a_bit, r"rank-000\.pt was altered"),
    ("rank-000.pt", lambda path: path.unlink(), r"rank-000\.pt is missing"),
    ("trainer.json", change_the_step, r"trainer\.json was altered"),
    ("manifest.json", lambda path: path.unlink(), r"step-00000004 has no manifest\.json"),
    ("manifest.json", lambda path: path.write_text("{"), r"manifest\.json cannot be read"),
    ("manifest.json", lambda path: path.write_text('{"format": 2, "files": {}}'), "does not list trainer.json"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_run_resumes_from_the_one_before(
    interrupted, uninterrupted, name, damage, message
):
    damaged = checkpoint.directory_of(interrupted.directory, 4)
    damage(damaged / name)
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    resumed = interrupted.config.override(stop_after=None, checkpoint_every=0)
    run = launch.run(resumed)
    assert run.result["resumed_from"] == 2
    (left_out,) = run.result["left_out"]
    assert left_out["checkpoint"] == "step-00000004"
    assert re.search(message, left_out["why"])
    assert_same(run, uninterrupted)
    assert {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()} == before, "nothing is deleted"


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(interrupted, uninterrupted):
    damaged = checkpoint.directory_of(interrupted.directory, 4)
    flip_a_bit(damaged / "engine" / "model.pt")
    assert_same(launch.run(interrupted.config.override(stop_after=None)), uninterrupted)
    checkpoint.verify(damaged)
    assert sorted(path.name for path in damaged.parent.iterdir()) == [f"step-{n:08d}" for n in (2, 4, 6, 7)]


@pytest.mark.parametrize(("name", "damage", "message"), [DAMAGE[1], DAMAGE[2], DAMAGE[6]])
def test_without_any_intact_checkpoint_nothing_restarts(interrupted, name, damage, message):
    for step in (2, 4):
        damage(checkpoint.directory_of(interrupted.directory, step) / name)
    with pytest.raises(CheckpointError, match=message.replace("00000004", "00000002")) as error:
        launch.run(interrupted.config.override(stop_after=None))
    assert "none of them is intact" in str(error.value) and "to start over from step 0" in str(error.value)
    assert [row["step"] for row in interrupted.directory.rows()] == [1, 2, 3, 4]


def test_damage_that_sizes_do_not_show_is_found_by_reading_every_byte(interrupted):
    """Before processes start, only sizes are compared, so this damage is not found yet."""
    damaged = checkpoint.directory_of(interrupted.directory, 4)
    flip_a_bit(damaged / "engine" / "model.pt")
    assert checkpoint.latest(interrupted.directory) == damaged
    assert directory.newest_intact(interrupted.directory)[0] == checkpoint.directory_of(interrupted.directory, 2)
    cut_short(damaged / "engine" / "model.pt")
    assert checkpoint.latest(interrupted.directory) == checkpoint.directory_of(interrupted.directory, 2)


def test_a_checkpoint_of_a_newer_format_is_refused_before_anything_starts(interrupted):
    """The checkpoint may be intact, and resuming from the one before it would throw steps away."""
    path = checkpoint.directory_of(interrupted.directory, 4)
    for name in ("trainer.json", "manifest.json"):
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | {"format": 99}))
        with pytest.raises(CheckpointError, match=r"written by a newer version, in format 99.*Update tutorial_lib"):
            manifest.read_trainer_state(path)
    with pytest.raises(CheckpointError, match=r"written by a newer version, in format 99.*Update tutorial_lib"):
        launch.preflight(interrupted.config)


def test_a_damaged_checkpoint_is_not_opened(interrupted):
    path = checkpoint.latest(interrupted.directory)
    flip_a_bit(path / "engine" / "model.pt")
    with pytest.raises(CheckpointError, match=r"engine/model\.pt was altered"):
        checkpoint.open_full(path)
    assert checkpoint.open_full(path, verified=True).names


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    run = RunDirectory(tmp_path)
    run.create()
    assert checkpoint.latest(run) is None
    for step in (9, 10, 100):
        make_checkpoint(run, step)
    (run.checkpoints / ".partial-step-00000200").mkdir()
    (run.checkpoints / "step-of-mine").mkdir()
    assert checkpoint.latest(run) == checkpoint.directory_of(run, 100)
    assert directory.newest_intact(run) == (checkpoint.directory_of(run, 100), [])


def test_an_unreadable_manifest_is_not_a_missing_one(run):
    path = make_checkpoint(run, 1)
    (path / "manifest.json").unlink()
    assert not isinstance(manifest.damage(path), manifest.Unreadable)
    (path / "manifest.json").mkdir()
    assert isinstance(manifest.damage(path), manifest.Unreadable)
