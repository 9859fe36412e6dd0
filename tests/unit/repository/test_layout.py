"""File tree in docs/layout.md, which must list every module and directory."""

from __future__ import annotations

import re

from tests.unit.repository.files import ROOT

TREE = (ROOT / "docs" / "layout.md").read_text().split("```")[1]


def test_every_module_and_every_directory_is_in_the_tree() -> None:
    # Files in lean_imports, which are named after the modules that they replace, and the directories of embedded models
    # need not be listed.
    modules = {
        path.stem
        for path in (ROOT / "tutorial_lib").rglob("*.py")
        if not path.name.startswith("__") and path.parent.name != "lean_imports"
    }
    directories = {
        path.parent.name
        for top in ("tutorial_lib", "tests", "notebooks")
        for path in (ROOT / top).glob("*/*")
        if path.is_file() and path.parent.name != "__pycache__" and not path.parent.name.startswith(".")
    }
    named = set(re.findall(r"\w+", TREE))
    assert sorted((modules | directories) - named) == []
