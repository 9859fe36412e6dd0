"""Training rows that are the same under every Python: sentences drawn from a few words by a seeded generator."""

from __future__ import annotations

import json
import random
from pathlib import Path

_WHO = "the reader,a program,the second rank,every worker,the engine,an optimizer,the file,this function".split(",")
_DOES = "returns,waits for,reads,sends,keeps,divides,gathers,checks,writes".split(",")
_WHAT = "a value,its gradient,the next batch,all parameters,one name,the whole text,a list of numbers".split(",")
_WHEN = "before the next step,if the file exists,on every device,when it is asked,after the update".split(",")


def write_rows(directory: Path, number: int = 128) -> str:
    """Write a directory that ``datasets`` reads as a data set with a ``train`` split, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0)

    def sentence() -> str:
        words = " ".join(drawn.choice(part) for part in (_WHO, _DOES, _WHAT, _WHEN))
        return words[0].upper() + words[1:] + "."

    rows = [" ".join(sentence() for _ in range(drawn.randint(2, 12))) for _ in range(number)]
    (directory / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(directory)
