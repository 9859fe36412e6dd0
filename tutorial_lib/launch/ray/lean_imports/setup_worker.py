"""Worker start for Ray: the raylet runs this script, which asks the warm server to fork a worker.

It stands in for Ray's own ``setup_worker.py``, which has the same task and arguments: set the environment variables of
the runtime environment, then become the worker. Without a server, or if the runtime environment has more than
variables, it runs Ray's own script. The file must keep this name, because the raylet looks for it.

This module imports little, because it runs whenever a worker starts.
"""

import json
import os
import socket
import sys

RAY_SCRIPT_VARIABLE = "TUTORIAL_LIB_RAY_SETUP_WORKER"
"""Environment variable with the path of Ray's own script."""

SERVER_VARIABLE = "TUTORIAL_LIB_RAY_SERVER"
"""Environment variable with the path of the warm server's socket."""


def main() -> None:
    """Ask the server to fork a worker; if that is impossible, become one as Ray's own script does."""
    context, worker = _split(sys.argv[1:])
    plain = set(context) <= {"env_vars", "py_executable"} and worker[0].endswith(".py")  # a script, not an option
    if plain and context.get("py_executable", sys.executable) == sys.executable:
        environment = {**os.environ, **context.get("env_vars", {})}
        if _fork({"arguments": worker, "environment": environment, "directory": os.getcwd(), "path": sys.path}):
            return
    os.execv(sys.executable, [sys.executable, os.environ[RAY_SCRIPT_VARIABLE], *sys.argv[1:]])


def _split(arguments: list[str]) -> tuple[dict, list[str]]:
    """Return the runtime environment's context without empty values, and the worker's script and arguments."""
    context, rest = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = {name: value for name, value in json.loads(value).items() if value}
        elif name != "--language":
            rest.append(argument)
    return context, rest


def _fork(worker: dict) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[SERVER_VARIABLE])
            # The server takes over this process's output with the first byte.
            socket.send_fds(connection, [b"w"], [1, 2])
            connection.sendall(json.dumps(worker).encode())
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1) == b"f"
        except (KeyError, OSError):
            return False


if __name__ == "__main__":
    main()
