"""Source listings that show the library's code as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutorial_lib.lab import claims as claims_module
from tutorial_lib.lab import sources
from tutorial_lib.theory import memory

ROOT = Path(__file__).parents[3]


def test_the_source_shown_is_the_source() -> None:
    shown = sources.show_source(memory.partition_elements)
    text = Path(memory.__file__).read_text(encoding="utf-8")
    assert shown.name == "tutorial_lib.theory.memory.partition_elements"
    assert shown.text.startswith("def partition_elements(") and shown.text in text
    assert str(ROOT) not in shown.html() + str(shown)


def test_methods_properties_and_class_methods_by_name() -> None:
    shown = sources.show_source(claims_module.Claims, only=["show", "check"])
    assert shown.text.index("def show") < shown.text.index("def check") and "def equal" not in shown.text
    assert sources.show_source(memory.ModelStates, only="total").text.startswith("@property\ndef total")
    assert sources.show_source(memory, only="ModelStates.to_dict").text.startswith("def to_dict")
    with pytest.raises(ValueError, match=r"'shown'.*show"):
        sources.show_source(claims_module.Claims, only="shown")


def test_docstrings_can_be_left_out() -> None:
    shown = sources.show_source(memory.Precision, docstrings=False)
    assert '"""' not in shown.text and "parameters: int" in shown.text
    compile(shown.text, "shown", "exec")


def test_source_html_keeps_every_character() -> None:
    import html
    import re

    shown = sources.Source("name", 'def f(x: "A<B") -> None:\n    """Doc & more."""\n    return x  # why\n')
    body = re.search(r"<pre[^>]*><code[^>]*>(.*)</code></pre>", shown.html(), re.DOTALL)
    assert body and html.unescape(re.sub(r"<[^>]+>", "", body[1])) == shown.text.rstrip()
    assert "color:#" in shown.html() and "var(" not in shown.html(), "JupyterLab removes variables from outputs not run"
