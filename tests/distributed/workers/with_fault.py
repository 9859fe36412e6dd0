"""Command line with a deliberate fault, for torchrun: ``python -m tests.distributed.workers.with_fault FAULT COMMAND``.

The fault, such as ``killed.in_forward``, is the module and name of a context manager in
:mod:`tests.distributed.injected` that yields a class of trainer.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from unittest import mock

from tutorial_lib import cli, trainer


def main(fault: str, *command: str) -> int:
    with pkgutil.resolve_name(f"tests.distributed.injected.{fault}")() as faulty:
        train_all = functools.partial(trainer.train_all, trainer_class=faulty)
        with mock.patch.object(trainer, "train_all", train_all):
            return cli.main(command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
