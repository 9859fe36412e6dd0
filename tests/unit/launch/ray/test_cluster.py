"""Start under Ray: the launcher does not hang if Ray cannot start a worker. Workers start with or without a server."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch import WorkerError
from tutorial_lib.launch.ray import cluster, waiting
from tutorial_lib.launch.ray.lean_imports import setup_worker
from tutorial_lib.launch.ray.storage import forget_deleted_checkpoints
from tutorial_lib.records import RunDirectory


def test_a_python_under_a_path_with_a_space_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "executable", "/an empty dir/bin/python")
    with pytest.raises(ConfigError, match="directory without spaces, or write launcher='local'"):
        cluster.start(Config.create(launcher="ray"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"RAY_ADDRESS is '127.0.0.1:1', but nothing answers there .*unset RAY_ADDRESS to start Ray on"),
        ("ray://127.0.0.1:10001", "Ray Train does not run through Ray's client. Write HOST:PORT of the head node"),
        ("head", "RAY_ADDRESS is 'head', but nothing answers there"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message):
        cluster.start(Config.create(launcher="ray"))


def test_an_address_with_another_server_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HEALTH_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"no Ray cluster answers there within 1 s\. Start the cluster"):
            cluster.start(Config.create(launcher="ray"))


def test_a_cluster_of_ray_start_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, Ray would join the cluster of ``ray start``, and then refuse num_cpus."""
    import ray

    def init(address: str | None = None, **options: object) -> None:
        raise RuntimeError(f"asked for {address}")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TUTORIAL_LIB_WARM_WORKERS", "0")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="Ray did not start: asked for local"):
        cluster.start(Config.create(launcher="ray"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /very/long"), "Set TMPDIR to a shorter one"),
        (TimeoutError("no raylet"), "end other programs and try again"),
        (RuntimeError("The current node timed out during startup."), "end other programs and try again"),
        (ValueError("num_cpus must not be provided"), "Ray's own logs are under"),
    ],
)
def test_each_cause_has_its_own_advice(error: Exception, advice: str) -> None:
    said = cluster.advise(error)
    assert advice in said
    assert ("other programs" in said) == (advice == "end other programs and try again")


def test_ray_must_start_a_worker_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    check = waiting.limit_wait(waiting.watch_for_start([run]))
    check()
    monkeypatch.setattr(waiting, "START_TIMEOUT", 0)
    with pytest.raises(WorkerError, match="Ray started no worker within 0 s"):
        check()
    run.log_file(1).touch()
    check()


def test_rays_list_is_dropped_once_a_checkpoint_in_it_is_missing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    listed = ["checkpoints/step-00000002", "checkpoints/step-00000004"]
    for name in listed:
        (tmp_path / name).mkdir(parents=True)
    snapshot = tmp_path / "checkpoint_manager_snapshot.json"
    content = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in listed]})
    forget_deleted_checkpoints(run)
    snapshot.write_text(content)
    forget_deleted_checkpoints(run)
    assert snapshot.read_text() == content
    (tmp_path / listed[0]).rmdir()
    forget_deleted_checkpoints(run)
    assert not snapshot.exists()
    snapshot.write_text(content[:-9])
    forget_deleted_checkpoints(run)
    assert not snapshot.exists()


def start_worker(tmp_path: Path, context: dict[str, object]) -> str:
    """Run the raylet's command, with a stand-in for Ray's own script, and return its output."""
    ray_script = tmp_path / "ray_script.py"
    ray_script.write_text("import sys; print(*sys.argv[1:3])")
    given = ["default_worker.py", "--node-id=1", "--language=PYTHON"]
    given.append(f"--serialized-runtime-env-context={json.dumps(context)}")
    environment = {
        **os.environ,
        setup_worker.SERVER_VARIABLE: str(tmp_path / "server"),
        setup_worker.RAY_SCRIPT_VARIABLE: str(ray_script),
    }
    command = [sys.executable, setup_worker.__file__, *given]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=10).stdout


CONTEXT = {"env_vars": {"COLOUR": "blue"}, "command_prefix": [], "py_executable": sys.executable}


def test_the_server_is_sent_the_workers_environment(tmp_path: Path) -> None:
    asked = []

    def answer() -> None:
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as request:
            asked.append(json.loads(request.read()[1:]))
            connection.sendall(b"f")

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        server.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        assert start_worker(tmp_path, CONTEXT) == "", "Ray's own script must not run as well"
        thread.join()
    (worker,) = asked
    assert worker["arguments"] == ["default_worker.py", "--node-id=1"]
    assert worker["environment"]["COLOUR"] == "blue"


def test_without_a_server_ray_starts_the_worker(tmp_path: Path) -> None:
    assert start_worker(tmp_path, CONTEXT) == "default_worker.py --node-id=1\n"


def test_ray_starts_a_worker_that_needs_more_than_variables(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        server.listen()
        assert start_worker(tmp_path, {**CONTEXT, "command_prefix": ["nice"]}) == "default_worker.py --node-id=1\n"
