"""Tables as text, Markdown and HTML, and the formats of numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tutorial_lib import tables


def test_a_table_is_aligned_text_and_plain_html() -> None:
    shown = tables.table(
        [{"stage": "0", "bytes": 2179072, "ratio": 1.0}, {"stage": "3 <offload>", "bytes": None, "ratio": 1 / 3}],
        caption="Model states",
    )
    assert str(shown).splitlines() == [
        "Model states",
        "stage            bytes     ratio",
        "-----------  ---------  --------",
        "0            2,179,072         1",
        "3 <offload>          -  0.333333",
    ]
    html = shown._repr_mimebundle_()["text/html"]
    assert "3 &lt;offload&gt;" in html and "<caption" in html and "text-align:right" in html
    assert "color:#" not in html  # a theme's own colours apply
    assert tables.table([{"a": 1, "b": 2}], ["b"]).columns == ("b",)
    assert str(tables.table([])) == "\n"


def test_markdown_marks_columns_of_numbers_and_escapes_bars() -> None:
    shown = tables.table([{"layout": "dp | tp", "GB": 1.5}], caption="left out")
    assert shown.markdown().splitlines() == ["| layout | GB |", "| --- | ---: |", "| dp \\| tp | 1.5 |"]


def test_numbers_of_numpy_are_aligned_as_numbers_and_bools_are_not() -> None:
    rows = [{"steps": np.int64(8), "loss": np.float32(0.5), "done": True}]
    assert tables.table(rows).markdown().splitlines()[1] == "| ---: | ---: | --- |"


def test_columns_are_as_wide_as_their_widest_cell_or_wider() -> None:
    rows = [("rank", "node", ""), ("0", "node-with-a-long-name", "cpu"), ("10", "b", "")]
    assert tables.align(rows, (True, False, False), least=(6, 8, 0), gaps=(" ", "|")) == [
        "  rank node                 |",
        "     0 node-with-a-long-name|cpu",
        "    10 b                    |",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (9_999, "9,999 B"), (139_840 * 4, "546.2 KiB"), (7.5e9, "6.985 GiB"), (2**50, "1,024 TiB")],
)
def test_bytes_as_text(num_bytes: float, text: str) -> None:
    assert tables.format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.01254, "0.0125"), (4.347, "4.35"), (99.97, "100"), (999.6, "1,000"), (4347.4, "4,347"), (-1e6, "-1,000,000")],
)
def test_measurements_have_about_three_digits(number: float, text: str) -> None:
    assert tables.format_short(number) == text
