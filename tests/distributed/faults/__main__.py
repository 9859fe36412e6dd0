"""Command ``python -m tests.distributed.faults``, which writes ``docs/faults.md``."""

from tests.distributed.faults import page

if __name__ == "__main__":
    page.PAGE.write_text(page.text(), encoding="utf-8")
