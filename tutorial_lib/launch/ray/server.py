"""Warm server for Ray: a process with everything imported, from which Ray's workers on this machine are forked.

Ray starts a new interpreter for each worker, for the controller of a fit, and for its helpers. Each of them imports
Ray, most import torch, and workers import DeepSpeed and transformers as well. This server imports all of that once,
while Ray itself starts, and then only waits. The raylet runs ``lean_imports/setup_worker.py``, which asks for a fork
through a socket.

Ray reads at import which node and job its process belongs to. So a server that forks for several nodes leaves Ray's own
modules to its forks.

The server runs no torch operation, no tokenizer and no Ray client, because their threads do not survive a fork. When
the process that started it closes the pipe at its standard input, or ends, the server and its forks end too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import traceback
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tutorial_lib.launch.warm_server import (
    JOB_SIGNALS,
    exit_with_launcher,
    import_everything,
    import_modules,
    signal_when_parent_ends,
    use_threads_of_environment,
)

RAY_TRAIN_MODULES = ("ray.train.torch", "ray.train.v2._internal.execution.controller.controller")
"""Modules to import once the cluster is running: at import, Ray reads which cluster and job its process belongs to."""

CLUSTER_VARIABLES = ("RAY_RAYLET_PID", "RAY_JOB_ID")
"""Environment variables that Ray reads only at that import."""

_SERVER = os.getpid()


def main(launcher_pid: str, address: str) -> None:
    """Serve until standard input ends."""
    launcher = int(launcher_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # here and in every fork: the launching process handles them
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        with exit_with_launcher(launcher):
            import_everything()
            if not (line := sys.stdin.readline()):
                return
            cluster: dict[str, str] = json.loads(line)
            if cluster:
                os.environ.update(cluster)
                _import_ray()
        if importlib.import_module("torch").cuda.is_initialized() or (cluster and not _forks_draw_different_ids()):
            return  # Ray will start its workers itself
        own = {(name, cluster[name]) for name in CLUSTER_VARIABLES if cluster}  # empty if it serves any cluster
        # Let the kernel reap the forks, but only from here on: imports run programs and need their exit codes.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError, ValueError):
                request, outputs = _receive(connection)
                is_ours = own <= request["environment"].items()
                if is_ours and os.fork() == 0:
                    server.close()
                    connection.close()
                    try:
                        _become_worker(request, outputs)
                    except Exception:
                        traceback.print_exc()
                        sys.exit(1)
                    sys.exit()  # a worker never goes back to the server's loop
                for output in outputs:
                    os.close(output)
                if is_ours:
                    connection.sendall(b"f")


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
    return json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b""))), outputs


def _import_ray() -> None:
    """Import Ray Train without drawing any of Ray's random numbers: all forks would draw the same ones next."""
    ray = importlib.import_module("ray.actor")
    new = ray.ActorClassID
    with mock.patch.object(ray, "ActorClassID", SimpleNamespace(from_random=lambda: new(os.urandom(new.size())))):
        import_modules(RAY_TRAIN_MODULES)


def _forks_draw_different_ids() -> bool:
    """Return whether forks draw different identifiers. If not, Ray would confuse the tasks of different actors."""
    drawn = set()
    for _ in range(2):
        reading, writing = os.pipe()
        if not (pid := os.fork()):
            os.write(writing, importlib.import_module("ray").UniqueID.from_random().binary())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            drawn.add(pipe.read())
        os.waitpid(pid, 0)
    return len(drawn) == 2


def _become_worker(request: dict[str, Any], outputs: list[int]) -> None:
    """Become the worker: run its script as a new interpreter would."""
    signal_when_parent_ends(signal.SIGKILL)
    os.setpgid(0, 0)  # when a worker ends, Ray ends its process group
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in zip((null, *outputs), (0, 1, 2), strict=True):
        os.dup2(old, new)
        os.close(old)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    script, *_ = sys.argv = request["arguments"]
    sys.path[:] = [os.path.dirname(script), *request["path"][1:]]
    use_threads_of_environment()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2])
    finally:
        if os.getpid() == _SERVER and os.getppid() != int(sys.argv[1]):
            # The process that started this one was killed, so nothing else can remove the socket's directory.
            shutil.rmtree(os.path.dirname(sys.argv[2]), ignore_errors=True)
