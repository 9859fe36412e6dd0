"""Faults, really injected, and the state that they leave: every row of ``faults.FAULTS`` is a test here.

After each fault a run either continues, with rows and final weights equal to the undisturbed run bit for bit, or
stops with an error that names the cause and the next step; and no intact checkpoint is lost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed import cases, faults, small_storage, worker
from tests.distributed.comparing import Observed, assert_identical
from tests.distributed.launching import ROOT, Shell, observe, train_command
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import CheckpointError
from tutorial_lib.checkpoint.directory import checkpoints
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch.ray import cluster
from tutorial_lib.launch.ray import train as ray_train
from tutorial_lib.launch.ray.nodes import NOTICE_A_LOST_NODE
from tutorial_lib.records import RunDirectory

SOON = 30
"""Seconds from a rank's end to the error. Gloo's own timeout is 600."""

RECORD = ("step", "loss", "grad_norm", "tokens", "epoch", "lr")
LONG = 48
"""Steps of a run that gets signals from outside, at no particular step."""

PROOFS: dict[str, Callable[..., None]] = {}


def proves(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function as the proof of the fault of this name. It gets pytest's ``request``."""

    def register(proof: Callable[..., None]) -> Callable[..., None]:
        PROOFS[name] = proof
        return proof

    return register


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_a_run_survives(fault: faults.Fault, request: pytest.FixtureRequest) -> None:
    PROOFS[fault.name](request)


# ----------------------------------------------------------------------------------------------- runs, as few as can be


@pytest.fixture(scope="module")
def sound(directory: Path) -> dict[str, Observed]:
    """Run the undisturbed runs, and return them by kind."""
    configs = {kind: cases.fault(directory, kind, f"sound-{kind}") for kind in {*cases.FATAL.values()}}
    configs["long"] = cases.fault(directory, "zero1", "sound-long", steps=LONG, checkpoint_every=0)
    observe(list(configs.values()))
    return {kind: Observed.read(config) for kind, config in configs.items()}


@pytest.fixture(scope="module")
def struck(directory: Path) -> dict[str, tuple[launch.WorkerError, float]]:
    """Run everything that a fault takes down; return errors, and the time that each launch outlived its last write."""
    outcomes = {}
    for name, kind in cases.FATAL.items():
        config = cases.fault(directory, kind, f"broken-{name}")
        with pytest.raises(launch.WorkerError) as error:
            observe([config])
        last = max(path.stat().st_mtime for path in config.directory.rglob("*") if "lock" not in path.name)
        outcomes[name] = error.value, time.time() - last
    assert not [p for server in psutil.Process().children() for p in server.children()], "a rank outlives its launch"
    return outcomes


def damage_truncated(run: Path) -> None:
    saved = cases.checkpoint_of(run, cases.END) / "rank-001.pt"
    saved.write_bytes(saved.read_bytes()[:-1])


def damage_flipped(run: Path) -> None:
    saved = cases.shard(run, cases.END, rank=1)
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)


def damage_missing(run: Path) -> None:
    cases.shard(run, cases.END, rank=1).unlink()


def damage_no_manifest(run: Path) -> None:
    for step in (cases.END, cases.END - 2):
        (cases.checkpoint_of(run, step) / "manifest.json").unlink()


DAMAGED = {
    "truncated": (damage_truncated, r"rank-001\.pt has \d+ bytes, but \d+ were written\."),
    "flipped": (damage_flipped, r"zero_pp_rank_1_\S+optim_states\.pt was altered after it was written"),
    "missing": (damage_missing, r"zero_pp_rank_1_\S+optim_states\.pt is missing from the checkpoint\."),
    "no_manifest": (damage_no_manifest, r"step-0000000[68] has no manifest\.json"),
}


@pytest.fixture(scope="module")
def mended(directory: Path, sound: Any, struck: Any) -> dict[str, Observed]:
    """Start again, in one launch, the runs that were taken down, and copies with damaged checkpoints."""
    configs = {}
    for name, kind in cases.FATAL.items():
        configs[name] = cases.fault(directory, kind, f"mended-{name}")
        shutil.copytree(directory / "runs" / f"broken-{name}", configs[name].directory)
    for name, (damage, _) in DAMAGED.items():
        configs[name] = cases.fault(directory, "zero1", f"mended-{name}")
        shutil.copytree(directory / "runs" / "sound-zero1", configs[name].directory)
        damage(configs[name].directory)
    observe(list(configs.values()))
    return {name: Observed.read(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def on_small_storage(directory: Path, sound: Any) -> dict[str, dict[str, Any]]:
    """Return the report of :mod:`tests.distributed.small_storage` on its runs."""
    trial = subprocess.run([*small_storage.NAMESPACE, "true"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"this system lets nobody make a mount namespace: {trial.stderr.strip()}")
    command = [*small_storage.NAMESPACE, sys.executable, "-m", "tests.distributed.small_storage", str(directory)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads((directory / "small_storage.json").read_text()))


def all_intact(run: RunDirectory) -> list[int]:
    """Return the steps of a run's checkpoints, each of which must be intact."""
    for path in checkpoints(run):
        checkpoint.verify(path)
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run)]


def same_records(run: RunDirectory, reference: RunDirectory) -> None:
    for key in RECORD:
        assert [row[key] for row in run.rows()] == [row[key] for row in reference.rows()], key


# ------------------------------------------------------------------------------------------------ ranks that are killed


def left_by(name: str) -> tuple[list[int], int, list[int]]:
    """Return the intact checkpoints after a fault, the step that the run resumes from, and its final checkpoints."""
    return {
        "killed_in_publish": ([2], 4, [2, 4, 6, 8]),  # the checkpoint of step 4 only lacks its name
        "killed_in_prune": ([4], 4, [8]),
    }.get(name, ([2], 2, [2, 4, 6, 8]))


def goes_on_after(name: str, request: pytest.FixtureRequest, directory: Path) -> str:
    """Check everything that faults in a rank have in common, and return the error's text."""
    error, seconds = request.getfixturevalue("struck")[name]
    assert seconds < SOON
    whole, resumed_from, kept = left_by(name)
    left = RunDirectory(directory / "runs" / f"broken-{name}")
    assert all_intact(left) == whole
    run = request.getfixturevalue("mended")[name]
    assert run.directory.result()["resumed_from"] == resumed_from
    assert len(run.examples) == cases.END - resumed_from, "it trained the lost steps again, and no others"
    assert_identical(run, request.getfixturevalue("sound")[cases.FATAL[name]])
    assert all_intact(run.directory) == kept
    assert not list(run.directory.checkpoints.glob(".*")), "what was half written or half deleted is gone"
    return str(error)


def killed(name: str, rank: int) -> Callable[[pytest.FixtureRequest], None]:
    def proof(request: pytest.FixtureRequest) -> None:
        said = goes_on_after(name, request, request.getfixturevalue("directory"))
        assert f"Rank {rank} ended with exit code -9 and left no traceback: it was killed" in said
        assert f"it resumes: 'broken-{name}' from step-0000000{left_by(name)[1]}." in said

    return proof


@proves("killed_in_forward")
def killed_in_forward(request):
    killed("killed_in_forward", rank=1)(request)


@proves("killed_in_backward")
def killed_in_backward(request):
    killed("killed_in_backward", rank=1)(request)


@proves("killed_in_update")
def killed_in_update(request):
    killed("killed_in_update", rank=1)(request)


@proves("killed_in_save")
def killed_in_save(request):
    killed("killed_in_save", rank=1)(request)


@proves("killed_in_publish")
def killed_in_publish(request):
    killed("killed_in_publish", rank=0)(request)


@proves("killed_in_prune")
def killed_in_prune(request):
    killed("killed_in_prune", rank=0)(request)
    left = request.getfixturevalue("directory") / "runs/broken-killed_in_prune/checkpoints"
    assert [path.name[:-9] for path in left.glob(".*")] == [".deleting-step-00000002"], "it was struck half way"


@proves("killed_in_report")
def killed_in_report(request):
    killed("killed_in_report", rank=0)(request)
    half = (request.getfixturevalue("directory") / "runs/broken-killed_in_report/metrics.jsonl").read_text()
    assert half.count("\n") == 3 and not half.endswith("\n")


@proves("save_raises")
def save_raises(request):
    said = goes_on_after("save_raises", request, request.getfixturevalue("directory"))
    assert said.startswith("Rank 1 of run 'broken-save_raises' failed with OSError: the disk is full\n")
    assert 'raise OSError("the disk is full")' in said
    assert "rank-001.log" in said


def training_had_gone_on(name: str, request: pytest.FixtureRequest) -> None:
    left = RunDirectory(request.getfixturevalue("directory") / "runs" / f"broken-{name}")
    partial, saved = sorted(path.name for path in left.checkpoints.iterdir())
    assert partial.startswith(".partial-step-00000004-") and saved == "step-00000002"
    assert left.rows()[-1]["step"] > 4


@proves("killed_in_write")
def killed_in_write(request):
    killed("killed_in_write", rank=1)(request)
    training_had_gone_on("killed_in_write", request)
    left = request.getfixturevalue("directory") / "runs/broken-killed_in_write/checkpoints"
    torn, whole = (next(left.glob(f"{step}*/engine/engine/*zero_pp_rank_1_*optim_states.pt")).stat().st_size
                   for step in (".partial-step-00000004", "step-00000002"))  # fmt: skip
    assert 0 < torn < whole


@proves("limit_in_write")
def limit_in_write(request):
    said = goes_on_after("limit_in_write", request, request.getfixturevalue("directory"))
    first = said.splitlines()[0]
    assert first.startswith("Rank 1 of run 'broken-limit_in_write' failed with OSError: [Errno 27] File too large")
    assert re.search(r"/\.partial-step-00000004-[0-9a-f]{8}/engine/engine/", first)
    training_had_gone_on("limit_in_write", request)


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def interrupted_long(directory: Path, sound: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run a long run: refuse it a second start, stop it by SIGTERM, and kill its next launcher."""
    shell = Shell(tmp_path_factory.mktemp("shell"))
    config = cases.fault(directory, "zero1", "signalled", steps=LONG, checkpoint_every=0)
    run, seen = RunDirectory(config.directory), {"config": config}
    try:
        shell.start(train_command(config))
        shell.wait_for_step(run, 1)
        with pytest.raises(ConfigError) as error:
            launch.run(config)
        seen["second_start"] = str(error.value), shell.process.pid
        os.killpg(shell.process.pid, signal.SIGTERM)
        seen["stopped"] = shell.exit_code(), (shell.scratch / "stderr").read_text(), shell.result()

        shell.start(train_command(config))
        shell.wait_for_step(run, seen["stopped"][2]["step"] + 1)
        workers = psutil.Process(shell.process.pid).children(recursive=True)
        os.kill(shell.process.pid, signal.SIGKILL)
        seen["alive"] = psutil.wait_procs(workers, timeout=SOON)[1]
        seen["killed"] = run.result()

        shell.start(train_command(config))
        seen["ended"] = shell.exit_code(), (shell.scratch / "stderr").read_text(), shell.result()
    finally:
        shell.end()
    return seen


@proves("signalled")
def stopped_by_a_signal(request):
    seen = request.getfixturevalue("interrupted_long")
    code, said, result = seen["stopped"]
    assert (code, said, result["status"]) == (75, "", "stopped")
    assert 0 < result["step"] < seen["killed"]["step"], "the next start went on"
    ends_like_the_undisturbed(request, seen)


@proves("launcher_killed")
def launcher_killed(request):
    seen = request.getfixturevalue("interrupted_long")
    assert not seen["alive"], "workers outlive the process that started them"
    assert seen["killed"]["status"] == "stopped"
    assert seen["ended"][2]["resumed_from"] == seen["killed"]["step"] < LONG
    ends_like_the_undisturbed(request, seen)


@proves("two_starts")
def two_starts(request):
    seen = request.getfixturevalue("interrupted_long")
    said, pid = seen["second_start"]
    assert re.search(rf"is already running: process {pid} on \S+, since \d{{4}}-\S+\. Wait for its end", said)
    ends_like_the_undisturbed(request, seen)


def ends_like_the_undisturbed(request: pytest.FixtureRequest, seen: dict[str, Any]) -> None:
    code, said, result = seen["ended"]
    assert (code, said, result["status"]) == (0, "", "completed")
    run, whole = RunDirectory(seen["config"].directory), request.getfixturevalue("sound")["long"].directory
    same_records(run, whole)
    same_states(run, whole)
    all_intact(run)


def same_states(run: RunDirectory, reference: RunDirectory) -> None:
    """Compare the weights and moments of the last checkpoints, bit for bit."""
    found, expected = (checkpoint.open_full(checkpoint.latest(each)) for each in (run, reference))
    assert found.names == expected.names
    for name in expected.names:
        assert found.parameter(name).equal(expected.parameter(name)), name
    for name in expected.trained:
        for moment in checkpoint.MOMENTS:
            assert found.moment(name, moment).equal(expected.moment(name, moment)), (name, moment)


# -------------------------------------------------------------------------------------------------------------- storage


def mended_storage(request: pytest.FixtureRequest, name: str, run_name: str, reason: str) -> None:
    told = request.getfixturevalue("on_small_storage")[name]
    assert re.search(reason, told["error"].splitlines()[0] + told["error"].splitlines()[1]), told["error"]
    assert "run the same command again" in told["error"]
    assert (told["newest"], told["left_out"]) == ("step-00000002", 0)
    config = cases.fault(request.getfixturevalue("directory"), "zero1", run_name)
    assert_identical(Observed.read(config), request.getfixturevalue("sound")["zero1"])
    assert all_intact(RunDirectory(config.directory)) == [2, 4, 6, 8]


@proves("disk_full")
def disk_full(request):
    mended_storage(request, "disk_full", "disk_full", r"cannot be written to \(No space left on device")


@proves("read_only")
def read_only(request):
    mended_storage(request, "read_only", "broken-read_only", r"cannot be written to \(Read-only file system")


# -------------------------------------------------------------------------------------------------- damaged checkpoints


def falls_back(request: pytest.FixtureRequest, name: str, *left_out: int) -> None:
    run, whole = request.getfixturevalue("mended")[name], request.getfixturevalue("sound")["zero1"]
    result = run.directory.result()
    assert result["resumed_from"] == min(left_out) - 2
    assert [each["checkpoint"] for each in result["left_out"]] == [f"step-{step:08d}" for step in left_out]
    for each in result["left_out"]:
        assert re.search(DAMAGED[name][1], each["why"]), each
        assert f"Not resumed from {each['checkpoint']}: {each['why']}" in run.directory.log_file(0).read_text()
    assert_identical(run, whole)
    assert all_intact(run.directory) == [2, 4, 6, 8], "what was damaged is replaced"


@proves("truncated")
def truncated(request):
    falls_back(request, "truncated", 8)


@proves("flipped")
def flipped(request):
    falls_back(request, "flipped", 8)


@proves("missing")
def missing(request):
    falls_back(request, "missing", 8)


@proves("no_manifest")
def no_manifest(request):
    falls_back(request, "no_manifest", 8, 6)


@proves("none_intact")
def none_intact(request):
    """Check damage that only shows when ranks read it: every rank refuses, and the first error is printed."""
    directory, shell = request.getfixturevalue("directory"), request.getfixturevalue("shell")
    request.getfixturevalue("sound")
    config = cases.fault(directory, "zero1", "none-whole")
    shutil.copytree(directory / "runs" / "sound-zero1", config.directory)
    for step in (2, 4, 6, 8):
        saved = cases.shard(config.directory, step, rank=1)
        saved.write_bytes(saved.read_bytes()[:-1] + b"?")
    before = (config.directory / "metrics.jsonl").read_text()
    shell.start(train_command(config))
    assert shell.exit_code() == 1
    said = (shell.scratch / "stderr").read_text()
    first = said.splitlines()[0]
    assert (
        first.startswith("error: Rank ")
        and "failed with CheckpointError" in first
        and "none of them is intact" in first
    )
    assert len(set(re.findall(r"/step-(\d+)/\S+ was altered", first))) == 4
    assert (shell.scratch / "stdout").read_text() == ""
    assert (config.directory / "metrics.jsonl").read_text() == before


# ------------------------------------------------------------------------------------------------- another's checkpoint


@contextmanager
def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    before = path.read_text()
    content = json.loads(before)
    change(content)
    path.write_text(json.dumps(content))
    try:
        yield
    finally:
        path.write_text(before)


def refused_before_it_starts(request: pytest.FixtureRequest, error_type: type[Exception], message: str) -> None:
    config = cases.fault(request.getfixturevalue("directory"), "zero1", "sound-zero1")
    logs = {path: path.stat().st_mtime_ns for path in config.directory.joinpath("logs").iterdir()}
    with pytest.raises(error_type, match=message):
        launch.run(config)
    assert {path: path.stat().st_mtime_ns for path in config.directory.joinpath("logs").iterdir()} == logs
    assert [row["step"] for row in RunDirectory(config.directory).rows()] == list(range(1, cases.END + 1))


@proves("other_model")
def other_model(request):
    request.getfixturevalue("sound")
    model = request.getfixturevalue("directory") / "gpt2-dropout" / "config.json"
    with changed(model, lambda content: content.update(n_head=2)):
        refused_before_it_starts(request, ConfigError, r"a model that differs.*n_head was 4, now 2.*another name")


@proves("other_tokenizer")
def other_tokenizer(request):
    """Exchange two tokens: their number stays the same, but texts get different ids."""
    request.getfixturevalue("sound")

    def exchange(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        one, other = list(vocabulary)[300:302]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    with changed(request.getfixturevalue("directory") / "gpt2-dropout" / "tokenizer.json", exchange):
        refused_before_it_starts(request, ConfigError, r"another tokenizer.*another name")


@proves("newer_format")
def newer_format(request):
    request.getfixturevalue("sound")
    newest = cases.checkpoint_of(request.getfixturevalue("directory") / "runs" / "sound-zero1", cases.END)
    with changed(newest / "manifest.json", lambda content: content.update(format=99)):
        refused_before_it_starts(request, CheckpointError, r"written by a newer version, in format 99.*Update")


# ------------------------------------------------------------------------------------------------------------------ Ray


@pytest.fixture(scope="module")
def three_ray_nodes() -> Iterator[Any]:
    """Start three Ray nodes of one slot each, as raylets here. Rank 1 is not on the first one, which must survive."""
    with pytest.MonkeyPatch.context() as patch:
        ours = {"PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": cluster.TOKEN, "GLOO_SOCKET_IFNAME": "lo"}
        for name, value in {**cluster.SETTINGS, **NOTICE_A_LOST_NODE, **ours}.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        before = set(psutil.Process().children())
        try:
            nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        except Exception:  # on a busy machine, a node that has not started within 30 s
            cluster.end_processes(set(psutil.Process().children()) - before)
            raise
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1)
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            cluster.stop()
            nodes.shutdown()


def on_ray(request: pytest.FixtureRequest, name: str, **changes: Any) -> Config:
    given = {"launcher": "ray", "max_failures": 1, **changes}
    return cases.fault(request.getfixturevalue("directory"), "zero1", name, **given)


@proves("ray_worker_killed")
def ray_worker_killed(request):
    whole, monkeypatch = request.getfixturevalue("sound")["zero1"], request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(ray_train, "_worker", worker.killed_on_ray)
    config = on_ray(request, "ray-killed")
    with ray_train.session(config):
        run = launch.run(config)
    (restart,) = run.result["restarts"]
    assert (run.result["resumed_from"], restart["from_step"], restart["failed"]["rank"]) == (4, 4, 1)
    assert restart["failed"]["type"] == "ActorDiedError", restart
    assert abs(time.time() - restart["time"]) < 600
    same_records(run.directory, whole.directory)
    same_states(run.directory, whole.directory)
    assert all_intact(run.directory) == [2, 4, 6, 8]


@proves("ray_node_dies")
def ray_node_dies(request):
    cluster, whole = request.getfixturevalue("three_ray_nodes"), request.getfixturevalue("sound")["long"]
    config = on_ray(request, "ray-node", steps=LONG)
    gone: list[Any] = []

    def take_a_node(rows: list[Any]) -> None:
        if gone or rows[-1]["step"] < 3:
            return
        for node in cluster.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            if any("RayTrainWorker" in " ".join(p.cmdline()) for p in raylet.children(recursive=True)):
                gone.append(node)
                cluster.remove_node(node, allow_graceful=False)
                return

    with ray_train.session(config):
        run = launch.run(config, on_rows=take_a_node)
    assert gone
    (restart,) = run.result["restarts"]
    assert run.result["resumed_from"] == restart["from_step"] >= 2
    same_records(run.directory, whole.directory)
    same_states(run.directory, whole.directory)
    all_intact(run.directory)


def test_a_configuration_error_that_only_a_worker_finds_is_one_all_the_same(directory):
    blank = directory / "blank"
    blank.mkdir()
    (blank / "train.jsonl").write_text('{"text": " "}\n' * 8)
    config = cases.config(directory, name="blank", dataset="blank", dp=2)
    with pytest.raises(ConfigError, match="all 8 are blank") as error:
        launch.run(config)
    assert "Traceback" not in str(error.value)
