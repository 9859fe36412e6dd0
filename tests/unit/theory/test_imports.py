"""Imports of the theory package."""

from __future__ import annotations

import subprocess
import sys


def test_theory_imports_neither_torch_nor_other_packages() -> None:
    program = (
        "import sys\n"
        "from tutorial_lib.theory import known_models, layout_reasons, remedies\n"
        "others = [m for m in sys.modules if m.startswith('tutorial_lib.') and '.theory' not in m]\n"
        "assert not others and not {'torch', 'transformers', 'numpy'} & set(sys.modules), others"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
