"""torchrun's variables, which are used in processes that torchrun started, and refused or ignored elsewhere."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tutorial_lib.cli import main
from tutorial_lib.config import Config, ConfigError, RunConfig
from tutorial_lib.launch import torchrun as joining
from tutorial_lib.launch.environment import RENDEZVOUS, check_environment, is_under_torchrun, joined_rank

VARIABLES = (*RENDEZVOUS, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "GLOO_SOCKET_IFNAME")
SMALL = [
    "--steps",
    "2",
    "--global-batch",
    "2",
    "--seq-length",
    "32",
    "--max-examples",
    "8",
    "--no-evaluate",
    "--dp",
    "1",
]


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def torchrun(monkeypatch, **changes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in ({**own, "TORCHELASTIC_RUN_ID": "none"} | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def check(config):
    check_environment(config.run, config.parallel)


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_a_rank_variable_left_over_in_a_shell_is_ignored(monkeypatch, launcher):
    torchrun(monkeypatch, RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID=None)
    config = Config.create(launcher=launcher)
    check(config)
    rank, watched = joined_rank(config.run, config.parallel), is_under_torchrun(config.run, config.parallel)
    assert (rank, watched) == (None, False)


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_under_torchrun_another_launcher_is_refused(monkeypatch, capsys, tmp_path, launcher):
    torchrun(monkeypatch)
    assert main(["train", "--launcher", launcher, "--storage", str(tmp_path)]) == 2
    assert "Write --launcher none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "RANK is set without MASTER_ADDR. Start the ranks with torchrun"),
        ({"MASTER_ADDR": None, "WORLD_SIZE": None}, "RANK is set without WORLD_SIZE, MASTER_ADDR"),
        ({"RANK": "one"}, "RANK is 'one', not a whole number"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but dp x tp asks for 1 ranks, so the run would hang"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, not a port from 1 to 65535"),
    ],
)
def test_a_rendezvous_with_a_variable_missing_or_wrong(monkeypatch, capsys, tmp_path, changes, message):
    torchrun(monkeypatch, **changes)
    assert main(["train", "--launcher", "none", "--engine", "torch", *SMALL, "--storage", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_one_process_under_deepspeed_needs_no_variables_and_ignores_old_ones(monkeypatch, tmp_path):
    """The run has its own process, because DeepSpeed keeps its groups in global variables."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    arguments = ["train", "--launcher", "none", "--zero-stage", "1", *SMALL, "--storage", str(tmp_path), "--json"]
    ended = subprocess.run([sys.executable, "-m", "tutorial_lib", *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["status"] == "completed"


def test_deepspeed_a_second_time_in_one_process_is_refused(monkeypatch, capsys, tmp_path):
    """The second launch would fail with the groups of the first."""
    monkeypatch.setattr(joining, "_groups_of_deepspeed", True)
    arguments = ["train", "--launcher", "none", *SMALL, "--storage", str(tmp_path)]
    assert main([*arguments, "--zero-stage", "1"]) == 2
    assert "can run it only once with launcher='none', and this one has" in capsys.readouterr().err
    assert main([*arguments, "--engine", "torch", "--name", "torch"]) == 0


def test_a_stopped_rank_of_torchrun_ends_with_0(monkeypatch, capsys, tmp_path):
    torchrun(monkeypatch)
    arguments = ["train", "--launcher", "none", "--engine", "torch", *SMALL, "--storage", str(tmp_path)]
    assert main([*arguments, "--stop-after", "1"]) == 0, "torchrun would take 75 for a failure"
    assert "stopped at step 1 of 2" in capsys.readouterr().out


def test_a_missing_network_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME is 'eth99', .* write one of: .*lo"):
        check(Config.create())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99,lo")
    check(Config.create())


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_loopback_is_refused_where_ranks_are_on_other_nodes(monkeypatch, name):
    monkeypatch.setenv(name, "lo")
    torchrun(monkeypatch, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    check(Config.create(launcher="none"))
    torchrun(monkeypatch, WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
    with pytest.raises(
        ConfigError, match=f"{name} is 'lo', the loopback interface.* only 1 of 2 ranks run on this one"
    ):
        check(Config.create(launcher="none"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "waited 1 s at 127.0.0.1:[0-9]+, but not all of the others arrived. .*exported by hand, unset them"),
        ({"MASTER_ADDR": "no-such-host.invalid", "RANK": "1"}, "cannot resolve the name 'no-such-host.invalid'"),
        ({"MASTER_ADDR": "two..dots", "RANK": "1"}, r"cannot resolve the name 'two\.\.dots'"),
    ],
    ids=["ranks that never come", "a name that does not resolve", "no name"],
)
def test_a_failed_rendezvous_is_explained(monkeypatch, changes, why):
    """A plain process has torchrun's variables, as if a user had exported them by hand."""
    torchrun(monkeypatch, **({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": None} | changes))
    monkeypatch.setattr(joining, "JOIN_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(joining.RendezvousError, match=why):
        with joining.process_group(RunConfig(launcher="none"), "env://"):
            pass


def test_a_port_in_use_is_named(monkeypatch):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        torchrun(monkeypatch, WORLD_SIZE="2", MASTER_PORT=str(taken.getsockname()[1]))
        with pytest.raises(joining.RendezvousError, match="another program is using the port"):
            with joining.process_group(RunConfig(launcher="none"), "env://"):
                pass


@pytest.mark.parametrize(
    ("last", "kind", "says"),
    [
        (
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4a000",
            ConfigError,
            r"share a GPU \(Duplicate GPU.*rank 1 and rank 0.*4a000\)\. Start no more ranks per node than it has GPUs",
        ),
        ("Cuda failure 'out of memory'", dist.DistBackendError, "out of memory"),
    ],
)
def test_an_error_of_nccl_is_not_taken_for_a_failed_rendezvous(monkeypatch, last, kind, says):
    """NCCL connects the ranks' GPUs once the ranks have met. The test needs no GPU: it raises NCCL's error itself."""

    def refuse(*given, **named):
        raise dist.DistBackendError(
            f"NCCL error in: NCCLUtils.cpp:77, invalid usage, NCCL version 2\nLast error:\n{last}"
        )

    torchrun(monkeypatch)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(kind, match=says):
        with joining.process_group(RunConfig(launcher="none"), "env://"):
            pass


def test_rank_0_prints_the_rendezvous_and_the_place_of_each_rank(monkeypatch, capsys, tmp_path):
    torchrun(monkeypatch)
    arguments = ["train", "--launcher", "none", "--engine", "torch", *SMALL, "--storage", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().err
    assert f"1 rank on 1 node met at 127.0.0.1:{os.environ['MASTER_PORT']}, rendezvous id none" in shown
    assert any(line.split() == ["0", "0", "0", socket.gethostname(), "0", "cpu"] for line in shown.splitlines())


@pytest.mark.parametrize(("device", "called"), [("cpu", "destroy_process_group"), ("cuda", "_abort_process_group")])
def test_a_rank_that_fails_leaves_its_group_without_waiting_for_the_others(monkeypatch, tmp_path, device, called):
    """On GPUs ``destroy_process_group`` waits for the other ranks, which wait for this one in a collective."""
    calls = []
    monkeypatch.setattr("tutorial_lib.mpu.device.local_device", lambda run: torch.device(device))
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: None)
    for module, name in ((dist, "destroy_process_group"), (dist.distributed_c10d, "_abort_process_group")):
        monkeypatch.setattr(module, name, lambda name=name: calls.append(name))
    with pytest.raises(MemoryError):
        with joining.process_group(RunConfig(launcher="none"), f"file://{tmp_path}/rendezvous"):
            raise MemoryError
    assert calls == [called]
    with joining.process_group(RunConfig(launcher="none"), f"file://{tmp_path}/again"):
        pass
    assert calls == [called, "destroy_process_group"]
