"""Local launcher: ranks from a warm server, none of which may be left when something ends too early.

Most ranks here only report their own state (``workers/reporting_state.py``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.distributed.cases import small_runs
from tests.support.commands import train_command
from tests.support.launching import NEEDS_WARM_SERVER, Shell, interrupt_when, wait_until
from tutorial_lib import launch
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch import local
from tutorial_lib.records import RunDirectory

pytestmark = pytest.mark.timeout(180)

REPORTING_STATE, FAILING, SLEEPING = (
    f"tests.distributed.workers.{name}" for name in ("reporting_state", "failing", "sleeping")
)


@pytest.fixture
def light(monkeypatch):
    """Use servers that import next to nothing, which is enough for ranks that do not train."""
    monkeypatch.setattr(local, "MODULES", ("tutorial_lib.records",))


def config(storage: Path, name: str = "run", dp: int = 2, **flat) -> Config:
    settings = {"steps": 4, "global_batch": 4, "seq_length": 32, "max_examples": 16, "evaluate": False}
    return Config.create("cpu", name=name, dp=dp, storage=str(storage), **({"launcher": "local"} | settings | flat))


def launch_reporting_ranks(storage: Path, name: str = "run", dp: int = 2) -> list[dict]:
    """Launch ranks that report their state, and return the reports."""
    launch.run_all([config(storage, name, dp)], worker=REPORTING_STATE)
    return [json.loads((storage / name / f"rank-{rank}.json").read_text()) for rank in range(dp)]


def have_reported(run: Path) -> bool:
    """Return whether both ranks of a run have reported."""
    return all((run / f"rank-{rank}.json").exists() for rank in range(2))


@pytest.mark.usefixtures("light")
def test_every_launch_has_new_processes_of_one_server(tmp_path):
    first, second = launch_reporting_ranks(tmp_path, "first"), launch_reporting_ranks(tmp_path, "second", dp=4)
    (server,) = {rank["parent"] for rank in first + second}
    assert psutil.Process(server).ppid() == os.getpid()
    assert len({rank["pid"] for rank in first + second}) == 6
    assert [rank["rank"] for rank in second] == ["0", "1", "2", "3"]
    assert first[0]["rendezvous"] != second[0]["rendezvous"]
    assert not psutil.Process(server).children(), "no rank outlives its launch"


@NEEDS_WARM_SERVER
def test_ranks_are_set_up_like_new_interpreters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    warm = launch_reporting_ranks(tmp_path, "warm")
    monkeypatch.setenv("TUTORIAL_LIB_WARM_WORKERS", "0")
    cold = launch_reporting_ranks(tmp_path, "cold")
    for rank in (*warm, *cold):
        assert rank["directory"] == str(tmp_path)
        assert set(filter(None, sys.path)) <= set(rank["path"]), "ranks import from the same places as this process"
    assert [rank["threads"] for rank in warm] == [3, 3]
    assert [rank["threads"] for rank in cold] == [None, None], "a new interpreter imports torch only when it needs it"


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("what", ["environment", "sources"])
def test_a_server_that_could_not_follow_a_change_is_replaced(tmp_path, monkeypatch, what):
    before = launch_reporting_ranks(tmp_path, "before")
    if what == "environment":
        monkeypatch.setenv("TUTORIAL_LIB_TEST_VARIABLE", "new")
    else:
        source = Path(local.__file__)
        written = source.stat().st_mtime
        os.utime(source, (written, written + 1))
    try:
        after = launch_reporting_ranks(tmp_path, "after")
    finally:
        if what == "sources":
            os.utime(source, (written, written))
    assert after[0]["parent"] != before[0]["parent"]
    assert after[0]["variable"] == ("new" if what == "environment" else None)
    assert not psutil.pid_exists(before[0]["parent"])


def test_warming_up_returns_at_once_and_starts_one_server(tmp_path):
    began = time.monotonic()
    launch.warm_up(config(tmp_path))
    launch.warm_up(config(tmp_path, dp=4))
    assert time.monotonic() - began < 2, "it must not wait until the server has loaded"
    servers = [p for p in psutil.Process().children() if "warm_server" in " ".join(p.cmdline())]
    assert len(servers) == 1


@pytest.fixture(params=["warm", "cold"])
def way(request, monkeypatch):
    """Use both kinds of servers: one forks its ranks, and the other starts new interpreters."""
    monkeypatch.setenv("TUTORIAL_LIB_WARM_WORKERS", "1" if request.param == "warm" else "0")


@pytest.mark.usefixtures("light", "way")
def test_a_failing_rank_is_shown_in_its_own_words_and_the_server_keeps_running(tmp_path):
    before = launch_reporting_ranks(tmp_path, "before")
    with pytest.raises(launch.WorkerError, match=r"could not record its error. It printed:\nValueError: of ") as error:
        launch.run_all([config(tmp_path, "fails")], worker=FAILING)
    assert "failing.py" in str(error.value) and "speaks" in str(error.value)
    assert launch_reporting_ranks(tmp_path, "after")[0]["parent"] == before[0]["parent"]


@pytest.mark.usefixtures("light", "way")
def test_ranks_of_a_killed_server_end_and_the_error_says_so(tmp_path):
    def strike() -> None:
        wait_until(lambda: have_reported(tmp_path / "sleeps"))
        os.kill(json.loads((tmp_path / "sleeps" / "rank-1.json").read_text())["parent"], signal.SIGKILL)

    thread = threading.Thread(target=strike)
    thread.start()
    said = r"^The process that starts the ranks has died with exit code -9: it was killed, .* 'sleeps' from step 0\."
    with pytest.raises(launch.WorkerError, match=said):
        launch.run_all([config(tmp_path, "sleeps")], worker=SLEEPING)
    thread.join()
    ranks = [json.loads((tmp_path / "sleeps" / f"rank-{rank}.json").read_text())["pid"] for rank in range(2)]
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in ranks))
    assert len(launch_reporting_ranks(tmp_path, "after")) == 2


@pytest.mark.usefixtures("light")
def test_an_error_of_the_caller_is_shown_as_such_and_ends_the_ranks(tmp_path):
    def fail() -> None:
        wait_until(lambda: have_reported(tmp_path / "sleeps"))
        raise OSError("of the caller")

    asked = config(tmp_path, "sleeps")
    RunDirectory(asked.directory).create()
    with pytest.raises(OSError, match="of the caller"):
        local.launch([asked], fail, SLEEPING)
    ranks = [json.loads((tmp_path / "sleeps" / f"rank-{rank}.json").read_text())["pid"] for rank in range(2)]
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in ranks), 5)


# ------------------------------------------------------------------------------------------------- other programs

UNGUARDED = """
import sys
from pathlib import Path
from tutorial_lib import launch
from tutorial_lib.config import Config

with open("starts", "a") as starts:
    starts.write("started\\n")
config = Config.create("cpu", dp=2, storage="runs", launcher="local", steps=2, max_examples=16, evaluate=False,
                       global_batch=4, seq_length=32, zero_stage=1)
print(launch.run(config).result["status"])
"""


def test_a_script_needs_no_main_guard_and_leaves_nothing(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    ended = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "completed\n"), ended.stderr
    assert (tmp_path / "starts").read_text() == "started\n", "no rank ran the script again"


@NEEDS_WARM_SERVER
@pytest.mark.parametrize("when", ["while it loads", "when it is idle"])
def test_a_server_ends_with_the_process_that_started_it(when):
    code = (
        "from tutorial_lib.launch import local; local.warm_up(); print('up', flush=True); import time; time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "up\n"
    (server,) = psutil.Process(launcher.pid).children()
    if when == "when it is idle":
        wait_until(lambda: server.cpu_percent(0.3) < 1 and server.cpu_times().user > 1, 60)
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs([server], timeout=10)[1]


@pytest.mark.parametrize(
    ("number", "when", "launcher"),
    [
        (signal.SIGTERM, "before the first step", "local"),
        (signal.SIGUSR1, "in training", "local"),
        (signal.SIGTERM, "in training", "ray"),
    ],
)
def test_a_signal_to_every_process_of_a_job_saves_and_exits_with_75(tmp_path, number, when, launcher):
    """As under SLURM, the signal goes to the launching process, the servers (including Ray's own), and the ranks."""
    asked = config(tmp_path, zero_stage=1, steps=5000, max_examples=800, launcher=launcher)
    run = RunDirectory(asked.directory)
    shell = Shell(tmp_path)
    try:
        shell.start(train_command(asked))
        if when == "in training":
            shell.wait_for_step(run, 1)
        else:
            wait_until(run.logs.exists, 60)
            time.sleep(0.1)
        launcher = psutil.Process(shell.process.pid)
        everybody = [launcher, *launcher.children(recursive=True)]
        for process in everybody:
            with suppress(psutil.NoSuchProcess):  # a loading server runs short programs, such as compilers
                process.send_signal(number)
        assert shell.exit_code() == 75, (shell.scratch / "stderr").read_text()
    finally:
        shell.end()
    assert not psutil.wait_procs(everybody, timeout=10)[1]
    if when == "in training":
        assert shell.result()["status"] == "stopped"
        assert run.checkpoints.joinpath(f"step-{shell.result()['step']:08d}").is_dir()


# ----------------------------------------------------------------------------------------------------- interrupts


def test_one_interrupt_saves_drops_the_other_runs_and_ends_the_call(tmp_path, capfd):
    configs = [config(tmp_path, name, zero_stage=1, steps=400, max_examples=800) for name in ("a", "b")]
    thread = interrupt_when(lambda: (tmp_path / "a" / "metrics.jsonl").exists())
    began = time.monotonic()
    with pytest.raises(
        launch.Interrupted, match=r"run 'a' stopped at step \d+ of 400 and was saved; not started: b\."
    ) as e:
        launch.run_all(configs)
    thread.join()
    assert isinstance(e.value, KeyboardInterrupt)
    (run,) = e.value.runs
    assert run.result["stopped_by"] == "request" and run.result["step"] < 400
    assert "Stopping: saving after this step. Interrupt again to stop now" in capfd.readouterr().err
    assert not (tmp_path / "b" / "metrics.jsonl").exists()
    assert time.monotonic() - began < 60
    done = launch.run(configs[0].override(stop_after=run.result["step"] + 1))
    assert done.result["resumed_from"] == run.result["step"]


@pytest.mark.usefixtures("light", "way")
def test_a_second_interrupt_stops_now_and_nothing_trains_on(tmp_path):
    thread = interrupt_when(lambda: have_reported(tmp_path / "sleeps"), times=2)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch.run_all([config(tmp_path, "sleeps")], worker=SLEEPING)
    thread.join()
    assert time.monotonic() - began < 30
    ranks = [json.loads((tmp_path / "sleeps" / f"rank-{rank}.json").read_text())["pid"] for rank in range(2)]
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in ranks), 5)
    assert len(launch_reporting_ranks(tmp_path, "after")) == 2


@NEEDS_WARM_SERVER
def test_an_interrupt_while_the_server_loads_is_answered_at_once(tmp_path, monkeypatch):
    local.stop_server()
    monkeypatch.setattr(local, "warm_up", lambda device: None)  # the server starts to load only with the run
    send, sent = local._Server._send, []

    def noted_send(self, kind, content):
        send(self, kind, content)
        sent.append(kind)

    monkeypatch.setattr(local._Server, "_send", noted_send)
    thread = interrupt_when(lambda: sent)
    with pytest.raises(launch.Interrupted, match="stopped before training started; no step was run") as error:
        launch.run_all([config(tmp_path)], worker=REPORTING_STATE)
    thread.join()
    assert error.value.runs == []
    assert not (tmp_path / "run" / "rank-0.json").exists()
    assert not [p for p in psutil.Process().children() if "warm_server" in " ".join(p.cmdline())]


def test_a_configuration_error_that_only_a_worker_finds(directory):
    blank = directory / "blank"
    blank.mkdir()
    (blank / "train.jsonl").write_text('{"text": " "}\n' * 8)
    config = small_runs.config(directory, name="blank", dataset="blank", dp=2)
    with pytest.raises(ConfigError, match="all 8 are blank") as error:
        launch.run(config)
    assert "Traceback" not in str(error.value)
