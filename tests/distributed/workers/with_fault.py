"""Command line with a deliberate fault, for torchrun: ``python -m tests.distributed.workers.with_fault FAULT COMMAND``.

The fault is a context manager in :mod:`tests.distributed.injected`, by page and name, such as ``killed.in_forward``.
"""

from __future__ import annotations

import pkgutil
import sys

from tutorial_lib import cli


def main(fault: str, *command: str) -> int:
    with pkgutil.resolve_name(f"tests.distributed.injected.{fault}")():
        return cli.main(command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
