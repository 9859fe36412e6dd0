"""All cases as one step in one process: the quickest way to try every one of them on a CPU."""

from __future__ import annotations

from tests.gpu import activation_memory, async_checkpoint, environment, equality, traces, workshop
from tests.gpu.cases import Cases, Setting


def cases(setting: Setting) -> Cases:
    """Return every measurement except the SIGTERM's, which starts many processes for half a minute."""
    pages = (environment, equality, workshop, activation_memory, traces, async_checkpoint)
    found = {
        f"{page.__name__.split('.')[-1]}: {name}": case for page in pages for name, case in page.cases(setting).items()
    }
    del found["equality: SIGTERM"]
    return found
