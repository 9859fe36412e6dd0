"""What a run survives: the table that ``test_faults.py`` proves row by row and that the README shows.

``python -m tests.distributed.faults --write`` writes it into the README.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- faults: written by `python -m tests.distributed.faults --write` -->", "<!-- end of faults -->"

AGAIN = "stops with an error that names the rank; the same command goes on from the newest intact checkpoint"
BACK = "goes on from the newest intact checkpoint before it, and says which was left out and why"
REFUSED = "refused before a process starts, with the cause and what to do"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        name: of the run, or the test, that it happens to.
        happens: what it is, for the README.
        outcome: what is promised.
    """

    name: str
    happens: str
    outcome: str


FAULTS = (
    Fault("killed_in_forward", "SIGKILL of a rank in the forward pass (ZeRO-3)", AGAIN),
    Fault("killed_in_backward", "SIGKILL of a rank in the backward pass (ZeRO-1)", AGAIN),
    Fault("killed_in_update", "SIGKILL of a rank within the optimizer step (FSDP2)", AGAIN),
    Fault("killed_in_save", "SIGKILL of a rank while it saves", AGAIN),
    Fault(
        "killed_in_publish",
        "SIGKILL of rank 0 with a checkpoint complete and not yet renamed (ZeRO-3)",
        "stops with an error that names the rank; the same command renames the checkpoint and goes on from it",
    ),
    Fault("killed_in_prune", "SIGKILL of rank 0 while it deletes an old checkpoint (`keep_last`)", AGAIN),
    Fault("killed_in_report", "SIGKILL of rank 0 with half a row of `metrics.jsonl` written", AGAIN),
    Fault("save_raises", "an exception in one rank's save", AGAIN),
    Fault(
        "killed_in_write",
        "SIGKILL of a rank in the middle of a file that it writes while it trains on (`async_save`)",
        AGAIN,
    ),
    Fault(
        "limit_in_write",
        "a limit on the size of files that a rank meets while it writes and trains on (`async_save`)",
        AGAIN,
    ),
    Fault(
        "signalled",
        "SIGTERM, as a scheduler sends it before the end of a slot",
        "saves, exits with 75; the same command goes on",
    ),
    Fault("launcher_killed", "SIGKILL of the launching process", "the ranks save and stop; the same command goes on"),
    Fault(
        "disk_full",
        "a disk that is full in the middle of a save",
        "stops and says so; with room again, the same command goes on",
    ),
    Fault("read_only", "storage that turns read-only", "stops and says so; writable again, the same command goes on"),
    Fault("truncated", "the newest checkpoint has a file that is cut short", BACK),
    Fault("flipped", "the newest checkpoint has one bit flipped in a rank's shard", BACK),
    Fault("missing", "the newest checkpoint lacks a rank's file", BACK),
    Fault("no_manifest", "the two newest checkpoints have lost their manifest", BACK),
    Fault("none_intact", "no checkpoint is intact", "refused with every cause; it never starts from step 0 in silence"),
    Fault("other_model", "the checkpoint is of another model of the same name", REFUSED),
    Fault("other_tokenizer", "the checkpoint is of another tokenizer", REFUSED),
    Fault("newer_format", "the checkpoint was written by a newer version", REFUSED),
    Fault(
        "two_starts",
        "two starts of one run at the same time",
        "the second is refused and told who runs; the first is untouched",
    ),
    Fault(
        "ray_worker_killed",
        "SIGKILL of a Ray worker while it reports, `max_failures=1`",
        "Ray starts the workers again; `result.json` tells when and why",
    ),
    Fault(
        "ray_node_dies",
        "a Ray node dies, another has room, `max_failures=1`",
        "Ray starts the workers on the other node",
    ),
)


def section() -> str:
    """The README's section, between its markers."""
    rows = "\n".join(f"| {fault.happens} | {fault.outcome} |" for fault in FAULTS)
    return (
        f"{START}\n"
        f"Each of these {len(FAULTS)} faults is injected for real by `tests/distributed/test_faults.py`. Wherever a "
        "run goes on, its rows\nand final weights are those of the undisturbed run bit for bit, and no whole "
        f"checkpoint is lost.\n\n| what happens | what the run does |\n| --- | --- |\n{rows}\n{END}"
    )


def written(readme: str) -> str:
    """The README's text with the section as it should be.

    Raises:
        ValueError: the README lost the markers.
    """
    before, after = readme.split(START)[0], readme.split(END)[1] if END in readme else None
    if START not in readme or after is None:
        raise ValueError(f"README.md has no lines {START!r} and {END!r}")
    return before + section() + after


if __name__ == "__main__":
    text = written(README.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--write"]:
        README.write_text(text, encoding="utf-8")
    else:
        print(section())
