"""Nearly all cases as one step in one process, which is the quickest way to try them on a CPU."""

from __future__ import annotations

from tests.gpu import activation_memory, async_checkpoint, environment, equality, traces, workshop, workshop_table
from tests.gpu.cases import Cases, Setting


def cases(setting: Setting) -> Cases:
    """Return every measurement except SIGTERM's, which starts two more processes for half a minute."""
    pages = (environment, equality, workshop, activation_memory, traces, async_checkpoint, workshop_table)
    found = {
        f"{page.__name__.split('.')[-1]}: {name}": case for page in pages for name, case in page.cases(setting).items()
    }
    del found["equality: SIGTERM"]
    return found
