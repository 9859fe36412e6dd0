"""Report: everything that a checkpoint shows without unpickling it."""

import json
import os

from tests.support.torch_runs import STEPS, make_checkpoint, steps
from tutorial_lib import checkpoint
from tutorial_lib.cli import main


def test_inspecting_a_checkpoint_lists_its_contents(uninterrupted, capsys):
    path = checkpoint.latest(uninterrupted.directory)
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["intact"], report["damage"]) == (STEPS, True, [])
    assert report["settings"]["engine"] == "torch" and report["versions"]["torch"]
    assert report["written"]["host"] == os.uname().nodename
    there = {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if p.is_file()}
    del there["manifest.json"]
    assert {file["file"]: file["bytes"] for file in report["files"]} == there
    assert sum(report["parts"].values()) == sum(report["ranks"].values()) == report["bytes"] == sum(there.values())
    assert report["parts"]["weights"] == there["engine/model.pt"]
    assert report["parts"]["optimizer"] == there["engine/optimizer.pt"]
    assert report["parts"]["random states and data position"] == there["rank-000.pt"]
    assert main(["inspect", str(path)]) == 0
    assert "yes, every byte is as it was written" in capsys.readouterr().out


def test_inspecting_a_run_shows_which_checkpoints_are_intact(run, capsys):
    for step, loss in enumerate((2.0, 1.0, 3.0, 0.5), 1):
        make_checkpoint(run, step, record={"eval_loss": loss})
    damaged = checkpoint.directory_of(run, 4) / "trainer.json"
    damaged.write_text(damaged.read_text().replace("0.5", "0.4"))
    (checkpoint.directory_of(run, 1) / "more").write_text("")
    assert main(["inspect", str(run.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["intact"] for row in report["checkpoints"]] == [True, True, True, False]
    assert (report["newest"], report["best"]) == (steps(3)[0], steps(2)[0])
    assert main(["inspect", str(damaged.parent)]) == 1
    shown = capsys.readouterr().out
    assert f"{damaged} was altered" in shown and "<- DAMAGED" in shown
    assert main(["inspect", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "<- best" in shown and "<- newest" in shown and f"NO: {damaged} was altered" in shown


def test_a_renamed_copy_of_a_checkpoint_is_inspected(run, capsys):
    copy = make_checkpoint(run, 1).rename(run.path / "step-00000001.bak")
    assert main(["inspect", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1


def test_inspecting_unpickles_nothing(run, tmp_path, capsys):
    """A file would leave a trace if it were unpickled."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = make_checkpoint(run, 1)
    for name in ("rank-000.pt", "engine/.metadata", "engine/model.pt"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(pickle.dumps(Trap()))
    assert main(["inspect", str(path)]) == 0
    assert not (tmp_path / "sprung").exists()
    assert "NOT IN THE MANIFEST" in capsys.readouterr().out


def test_a_path_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "neither a checkpoint nor the directory of a run" in capsys.readouterr().err
