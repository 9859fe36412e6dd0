"""Report on one or all checkpoints of a run: the run that wrote them, the contents of each file, and any damage.

Nothing is unpickled: names, sizes and JSON are enough, so a checkpoint of unknown origin is safe to inspect.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.directory import ATTEMPTS, checkpoints, is_named_like_a_checkpoint, step_of
from tutorial_lib.checkpoint.formats import rank_and_contents
from tutorial_lib.checkpoint.manifest import MANIFEST, CheckpointError, file_damage, read_manifest, read_trainer_state
from tutorial_lib.config import ConfigError, settings
from tutorial_lib.records import RunDirectory
from tutorial_lib.tables import align

_SHOWN = (
    "model", "dataset", "engine", "dp", "tp", "zero_stage", "sharding", "deepspeed", "shard_at_load", "offload",
    "precision",
)  # fmt: skip
_OF_ENGINE = {"zero_stage": "deepspeed", "sharding": "fsdp", "deepspeed": "trainer", "shard_at_load": "trainer"}
"""Settings that are shown for one engine only."""


def inspect(path: Path) -> dict[str, Any]:
    """Collect everything about a checkpoint, or about all checkpoints of a run, ready for JSON.

    Raises:
        ConfigError: the path is neither a checkpoint nor a run with checkpoints.
    """
    path = path.expanduser()
    if (path / "checkpoints").is_dir():
        return inspect_run(RunDirectory(path))
    if not any((path / name).exists() for name in (MANIFEST, "trainer.json", "engine")):
        raise ConfigError(f"{path} is neither a checkpoint nor the directory of a run that has one.")
    return inspect_checkpoint(path)


def inspect_run(run: RunDirectory) -> dict[str, Any]:
    """Describe a run's checkpoints, oldest first, and name the newest intact one and the one with the lowest loss."""
    rows: list[dict[str, Any]] = []
    for _ in range(ATTEMPTS):  # a run that is training may delete all of them while they are read
        for path in checkpoints(run):
            if described := _inspect_unless_deleted(path):
                kept = ("step", "written", "bytes", "eval_loss", "intact", "damage")
                rows.append({"checkpoint": path.name, **{name: described[name] for name in kept}})
        if rows:
            break
    intact = [row for row in rows if row["intact"]]
    evaluated = [row for row in intact if row["eval_loss"] is not None]
    return {
        "run": str(run.path),
        "checkpoints": rows,
        "newest": intact[-1]["checkpoint"] if intact else None,
        "best": min(evaluated, key=lambda row: row["eval_loss"])["checkpoint"] if evaluated else None,
    }


def _inspect_unless_deleted(path: Path) -> dict[str, Any] | None:
    """Describe a checkpoint, or return None if its run, which is training, has deleted it meanwhile."""
    described = None
    try:
        described = inspect_checkpoint(path)
    except FileNotFoundError:
        if path.exists():
            raise
    return described if path.exists() else None


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint, and describe the run that wrote it, its contents, and any damage."""
    damage: list[str] = []
    trainer: dict[str, Any] = {}
    listed: dict[str, dict[str, Any]] = {}
    try:
        listed = read_manifest(path)
    except CheckpointError as error:
        damage.append(str(error))
    try:
        trainer = read_trainer_state(path)
    except CheckpointError as error:
        damage.append(str(error))
    found_files = (p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    present = {str(p.relative_to(path)): p.stat().st_size for p in found_files}
    damaged = {name: found for name, entry in sorted(listed.items()) if (found := file_damage(path / name, entry))}
    damage += map(str, damaged.values())
    saved = trainer.get("config", {})
    files = [
        {
            "file": name,
            **_contents(name, saved),
            "bytes": present.get(name, 0),
            "state": _state(name in present, name in listed, name in damaged),
        }
        for name in sorted({*present, *listed})
    ]
    parts: dict[str, int] = {}
    by_rank: dict[int, int] = {}
    for file in files:
        parts[file["what"]] = parts.get(file["what"], 0) + file["bytes"]
        by_rank[file["rank"]] = by_rank.get(file["rank"], 0) + file["bytes"]
    return {
        "checkpoint": str(path),
        "step": trainer.get("step", step_of(path) if is_named_like_a_checkpoint(path) else None),
        "format": trainer.get("format"),
        "written": trainer.get("written"),
        "versions": trainer.get("versions"),
        "settings": _shown(saved),
        "eval_loss": trainer.get("record", {}).get("eval_loss"),
        "intact": not damage,
        "damage": damage,
        "bytes": sum(file["bytes"] for file in files),
        "parts": parts,
        "ranks": {str(rank): by_rank[rank] for rank in sorted(by_rank)},
        "files": files,
    }


def _shown(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's main settings, with absolute paths shortened to their last part for privacy."""
    is_path = {name: setting.is_path for name, setting in settings().items()}
    named = {name: saved[name] for name in _SHOWN if name in saved}
    return {
        name: Path(value).name if is_path[name] and value and Path(value).is_absolute() else value
        for name, value in named.items()
        if _OF_ENGINE.get(name, saved["engine"]) == saved["engine"]
    }


def _state(present: bool, listed: bool, damaged: bool) -> str:
    if not present:
        return "missing"
    if not listed:
        return "not in the manifest"
    return "damaged" if damaged else "intact"


def _contents(name: str, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the rank that wrote a file, and the file's contents, judging by its name."""
    if found := re.fullmatch(r"rank-(\d+)\.pt", name):
        rank, what = int(found[1]), "random states and data position"
    elif found_by_format := rank_and_contents(name, saved.get("tp", 1), saved.get("zero_stage", 0)):
        rank, what = found_by_format
    else:
        rank, what = 0, "model configuration and tokenizer" if name.startswith("model/") else "record"
    return {"rank": rank, "what": what}


def table(report: dict[str, Any]) -> str:
    """Format a report as text."""
    if "checkpoints" in report:
        return _run_table(report)
    written, saved = report["written"] or {}, report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in (report["versions"] or {}).items())
    head = {
        "checkpoint": report["checkpoint"],
        "step": report["step"],
        "intact": "yes, every byte is as it was written" if report["intact"] else "NO",
        "written": f"{written['time']} on {written['host']}" if written else "unknown",
        "by": versions or "unknown",
        "settings": ", ".join(f"{name}={value}" for name, value in saved.items()),
        "evaluation loss": "not evaluated" if report["eval_loss"] is None else f"{report['eval_loss']:.4f}",
        "bytes": f"{report['bytes']:,}",
        **{f"  {what}": f"{size:,}" for what, size in report["parts"].items()},
        **{f"  rank {rank}": f"{size:,}" for rank, size in report["ranks"].items()},
    }
    named = [*head.items(), *(("damage", found) for found in report["damage"])]
    lines = align([(name, str(value)) for name, value in named], (False, False), least=(36, 0), gaps=(" ",))
    files = [("rank", "file", "bytes", "what")]
    for file in sorted(report["files"], key=lambda file: (file["rank"], file["file"])):
        note = "" if file["state"] == "intact" else f"  <- {file['state'].upper()}"
        files.append((str(file["rank"]), file["file"], f"{file['bytes']:,}", f"{file['what']}{note}"))
    return "\n".join([*lines, "", *align(files, (True, False, True, False), least=(4, 0, 15, 0))])


def _run_table(report: dict[str, Any]) -> str:
    rows = [("checkpoint", "bytes", "eval loss", "intact")]
    for row in report["checkpoints"]:
        loss = "-" if row["eval_loss"] is None else f"{row['eval_loss']:.4f}"
        marks = [mark for mark in ("newest", "best") if report[mark] == row["checkpoint"]]
        intact = ("yes" if row["intact"] else f"NO: {row['damage'][0]}") + (f"  <- {', '.join(marks)}" if marks else "")
        rows.append((row["checkpoint"], f"{row['bytes']:,}", loss, intact))
    lines = align(rows, (False, True, True, False), least=(20, 15, 9, 0), gaps=(" ", "  ", "  "))
    return "\n".join([f"{'run':20} {report['run']}", "", *lines])
