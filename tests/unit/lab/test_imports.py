"""Imports of the notebook tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tutorial_lib.lab.claims import MIME_TYPE

ROOT = Path(__file__).parents[3]


def test_the_lab_imports_no_heavy_library_and_no_engine() -> None:
    program = (
        "import sys\n"
        "from tutorial_lib.lab import claims, display, figures, images, progress, sources\n"
        "heavy = {'torch', 'deepspeed', 'ray', 'transformers', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('tutorial_lib.')}\n"
        "assert not heavy and rooms <= {'lab', 'tables', 'theory'}, (heavy, rooms)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_mime_type_is_json() -> None:
    """Only types that end in +json may carry lists in a notebook."""
    assert MIME_TYPE.endswith("+json")
