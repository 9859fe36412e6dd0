"""Batch scripts as text. ``tests/cluster`` submits real ones."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tutorial_lib import cli

ON_GPUS = ["slurm", "--nodes", "2", "--gpus-per-node", "4"]
ON_CPUS = ["slurm", "--profile", "cpu", "--nodes", "2", "--ranks-per-node", "2"]


def written(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Return the script, after bash has checked its syntax."""
    assert cli.main(arguments) == cli.DONE
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    return script


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?([^ \n]*)", script, re.MULTILINE))


def test_requested_resources_match_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, [*ON_GPUS, "--tp", "2", "--cpus-per-rank", "6"])
    asked = options(script)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "1", "4")
    assert asked["cpus-per-task"] == "24"
    assert "gpus" not in asked
    assert "--nproc-per-node=4" in script
    assert "--profile cluster --launcher none" in script and "--dp 4 --tp 2" in script


def test_the_cpu_script_differs_only_in_gpu_lines(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, [*ON_CPUS, "--cpus-per-rank", "3"])
    assert "gpu" not in script.lower()
    assert options(script)["cpus-per-task"] == "6"


def test_requeueing_and_memory_sampling_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, ON_GPUS)
    assert "measure.memory_sampler" in script and "scontrol requeue" in script and "requeue" in options(script)
    less = written(capsys, [*ON_GPUS, "--no-sample-memory", "--no-requeue"])
    assert "measure.memory_sampler" not in less and "scontrol requeue" not in less and "no-requeue" in options(less)


def test_all_rows_reach_train(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the word ``all``, train would read the default number of evaluation rows."""
    script = written(capsys, [*ON_CPUS, "--max-eval-examples", "all", "--max-examples", "7"])
    assert "--max-eval-examples all" in script and "--max-examples 7" in script


def test_settings_reach_train_as_they_were_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    storage = str(tmp_path / "two words")
    script = written(
        capsys, [*ON_CPUS, "--freeze", "*.h.0.*", "*.wpe.*", "--no-evaluate", "--storage", storage, "--name", "x"]
    )
    command = script[script.index("-m tutorial_lib train") : script.index("export -f")].replace("\\\n", " ")
    words = subprocess.run(
        ["bash", "-c", 'printf "%s\\n" ' + command.strip().rstrip("}")], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[:3] == ["-m", "tutorial_lib", "train"]
    assert words[words.index("--freeze") + 1 :][:2] == ["*.h.0.*", "*.wpe.*"]
    assert "--no-evaluate" in words
    assert words[words.index("--storage") + 1] == storage


def test_no_line_of_a_comment_hides_the_directives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM ignores directives that come after the script's first command."""
    monkeypatch.setattr("sys.argv", ["tutorial_lib", *ON_CPUS, "--output", "my\ntouch train.sbatch"])
    before, directives, _ = written(capsys, ON_CPUS).partition("#SBATCH")
    assert directives and all(line.startswith("#") for line in before.splitlines())


def test_an_experiment_by_its_workshop_name(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, ["slurm", "--experiment", "3ZO-8G4N"])
    assert (options(script)["nodes"], options(script)["gpus-per-node"]) == ("4", "2")
    assert (
        "--dp 8" in script and "--zero-stage 3 --offload all --no-pin-memory" in script and "--name 3ZO-8G4N" in script
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm"], "Write --gpus-per-node N, or --experiment NAME"),
        (["slurm", "--ranks-per-node", "2"], "cannot be used with device='cuda'. Write --gpus-per-node"),
        (["slurm", "--profile", "cpu", "--gpus-per-node", "2"], "Write --ranks-per-node"),
        ([*ON_GPUS, "--dp", "4"], "Leave dp out: it follows"),
        ([*ON_GPUS, "--tp", "8"], "a tensor-parallel group would span nodes"),
        ([*ON_GPUS, "--tp", "3"], "tp=3 does not divide the 4 ranks of a node"),
        (["slurm", "--gpus-per-node", "2", "--tp", "4"], r"tp=4 does not divide the 2 .* Write tp as one of \[1, 2\]"),
        (["slurm", "--gpus-per-node", "0"], "gpus_per_node is 0; the smallest possible value is 1"),
        ([*ON_GPUS, "--launcher", "ray"], "under SLURM torchrun starts them"),
        ([*ON_GPUS, "--resume", "never"], "write --no-requeue"),
        ([*ON_GPUS, "--time", "soon"], "Write HOURS:MINUTES:SECONDS"),
        ([*ON_GPUS, "--time", "00:02:00"], "which is before it starts"),
        ([*ON_GPUS, "--partition", "a b"], "partition is 'a b'"),
        ([*ON_CPUS, "--device", "tpu"], "device is 'tpu'|Write --ranks-per-node"),
        (["slurm", "--nodes", "0", "--gpus-per-node", "1"], "nodes is 0"),
        ([*ON_GPUS, "--deepspeed", "my\nfile.json"], r"'my\\nfile.json' contains a line break"),
        ([*ON_GPUS, "--freeze", "*.h.0.*\n"], "contains a line break"),
        (["slurm", "--experiment", "2Z-2G1N", "--nodes", "2"], "Experiment 2Z-2G1N sets --nodes itself"),
        (["slurm", "--experiment", "2Z-2G1N", "--zero-stage", "3"], "sets --zero-stage itself"),
        (["slurm", "--experiment", "2Z-3G2N"], "2 nodes cannot share 3 GPUs evenly"),
    ],
)
def test_conflicting_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == cli.BAD_CONFIGURATION
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command", [["slurm"], ["ray", "--format", "rayjob"]])
def test_a_file_under_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """A shell does not expand the ~ of --output=~/file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main([*command, "--nodes", "1", "--gpus-per-node", "8", "--storage", "/s", "--output=~/file"]) == 0
    assert (tmp_path / "file").read_text()
    assert f"{tmp_path}/file: " in capsys.readouterr().err


@pytest.mark.parametrize(("command", "key"), [(["slurm"], "script"), (["ray", "--format", "rayjob"], "manifest")])
def test_json_names_the_text_and_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], key: str
) -> None:
    given = [*command, "--nodes", "1", "--gpus-per-node", "8", "--storage", "/s", "--json"]
    assert cli.main(given) == cli.main([*given, "--output", str(tmp_path / "file")]) == cli.DONE
    printed, saved = map(json.loads, capsys.readouterr().out.splitlines())
    assert printed == {key: (tmp_path / "file").read_text(), "file": None}
    assert saved == {**printed, "file": str(tmp_path / "file")}
