"""Committed pictures, which must be the ones that the code draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutorial_lib.lab import images


@pytest.mark.parametrize("name", list(images.PICTURES))
def test_committed_pictures_are_what_the_code_draws(name: str, tmp_path: Path) -> None:
    drawn = images.draw(name, tmp_path / "a").read_bytes()
    assert drawn == images.draw(name, tmp_path / "b").read_bytes()
    committed = images.DIRECTORY / f"{name}.svg"
    assert committed.read_bytes() == drawn, f"{committed.name} is not what the code draws: run `make images`"
    assert b"<text" not in drawn and b"<dc:date" not in drawn  # letters are shapes, and there is no date


def test_no_other_picture_is_committed() -> None:
    assert {path.stem for path in images.DIRECTORY.glob("*.svg")} == set(images.PICTURES)
