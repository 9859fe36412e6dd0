"""Display of MIME bundles in notebooks and terminals. Re-exports the functions of :mod:`tutorial_lib.tables`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutorial_lib.tables import Table, format_bytes, format_value, table

__all__ = ["Table", "format_bytes", "format_value", "in_notebook", "show", "table"]


def in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel."""
    import sys

    # Asking IPython would import it, although workers and scripts do not need it.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def show(bundle: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Display a MIME bundle in a notebook; elsewhere print its ``text/plain``."""
    if in_notebook():
        from IPython.display import display

        display(dict(bundle), raw=True, metadata=dict(metadata or {}))
    else:
        print(bundle["text/plain"])
