"""Default subset for a run like the ZeRO workshop's: the Hugging Face Trainer on questions like SQuAD's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutorial_lib.config import Config, settings
from tutorial_lib.config.workshop import SUBSET
from tutorial_lib.dataloader.rows import load_rows
from tutorial_lib.dataloader.tokens import reads_questions


def choose_subset(config: Config, saved: Mapping[str, Any] | None = None) -> tuple[Config, str | None]:
    """Limit a Hugging Face Trainer run on questions to the workshop's rows, unless the caller set its own limits.

    Args:
        config: what to run.
        saved: settings, by flat name, of the checkpoint that the run resumes from; the run keeps its row limits.

    Returns:
        The configuration, and a sentence that says which rows are read and how to read all. Instead of the sentence,
        None if this call leaves out no rows, or if the run resumes.

    Raises:
        ConfigError: the training split cannot be read.
    """
    data, flat, known = config.data, config.flat(), settings()
    unset = [flag for flag in SUBSET if flag not in config.given and flat[flag] == known[flag].default]
    if config.engine.name != "trainer" or not unset:
        return config, None
    if saved:
        return config.replaced(**{flag: saved.get(flag, flat[flag]) for flag in unset}), None
    chosen = {flag: SUBSET[flag] for flag in unset}
    rows = load_rows(data.name, data.train_split)
    if not reads_questions(rows):
        return config, None
    lengths = {"max_examples": len(rows)}
    if config.run.evaluate:
        lengths["max_eval_examples"] = len(load_rows(data.name, data.eval_split))
    splits = {"max_examples": data.train_split, "max_eval_examples": data.eval_split}
    cut = [flag for flag, most in chosen.items() if lengths.get(flag, 0) > most]
    used = " and ".join(f"the first {chosen[flag]} of the {lengths[flag]} rows of {splits[flag]!r}" for flag in cut)
    more = " and ".join(f"{flag}=None (--{flag.replace('_', '-')} all)" for flag in cut)
    said = f"This run reads {used}, as the ZeRO workshop does. To read all rows, write {more}."
    return config.replaced(**chosen), said if cut else None
