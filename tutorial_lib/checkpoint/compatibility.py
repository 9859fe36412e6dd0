"""Compatibility between a checkpoint and a run that would resume from it, checked before it trains.

Settings that affect an update must be the same, and so must the model, tokenizer and data that they name. Model,
tokenizer and data are compared by content (their *identity*): a directory that was moved is still the same, but one
that kept its name and got different content is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tutorial_lib.checkpoint.directory import step_of
from tutorial_lib.checkpoint.manifest import read_trainer_state
from tutorial_lib.config import FREE_ON_RESUME, Config, ConfigError, DataConfig, ModelConfig, RunConfig, settings
from tutorial_lib.config.checks import NO_RESUME
from tutorial_lib.models import load_tokenizer, load_trained_config
from tutorial_lib.models.loading import resolve_model
from tutorial_lib.models.stored import locate_weights

DataIdentity = Callable[[], dict[str, str]]
"""Function that returns the SHA-256 of each split's tokens (``train``, and ``eval`` if the run evaluates)."""


def shape(flat: dict[str, Any]) -> dict[str, Any]:
    """Return, by flat name, the settings that decide which rank holds which part of the state, and in which format."""
    names = (name for name, setting in settings().items() if flat["engine"] in setting.shape_of)
    return {name: flat[name] for name in ("engine", "device")} | {name: flat[name] for name in names}


def check_continues(config: Config, found: Path, data: DataIdentity | None) -> None:
    """Refuse a checkpoint that the run must not, or cannot, resume from.

    Args:
        config: what to run.
        found: the checkpoint.
        data: returns the hashes of the run's current data; only called if there is something to compare them with.
            None if this start reads no data, or reads it only on other machines; the data is then not compared.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: its settings, model, tokenizer or data are different, or ``resume='never'`` forbids resuming.
    """
    if config.run.resume == "never":
        raise ConfigError(
            f"Run {config.run.name!r} has the checkpoint {found}, and resume='never' forbids resuming from it. "
            "Choose another name, or write resume='auto'."
        )
    check_same_run(read_trainer_state(found), config, data)


def check_same_run(trainer: dict[str, Any], config: Config, data: DataIdentity | None) -> None:
    """Refuse to continue a run with settings, a model or data that would make its updates different.

    The number of ranks, the engine, the ZeRO stage and everything else about where the state is kept may change, except
    under the Hugging Face Trainer. So may the directory of a model or data set, if its content is the same.

    Args:
        trainer: content of the checkpoint's ``trainer.json``.
        config: what to run.
        data: as in :func:`check_continues`.

    Raises:
        ConfigError: names every setting that differs, with both values, or the content that changed.
    """
    saved, before = trainer["config"], trainer.get("identity", {})  # format 1 recorded no identity
    _check_is_resumable(saved, config)
    _check_shape(saved, config)
    moved = {flag for flag in ("model", "dataset") if saved[flag] != config.flat()[flag]}
    model_changes = _model_changes(before, identity(config.model)) if before else []

    def data_changes() -> list[str]:
        return _data_changes(before["data"], data(), config.data) if before.get("data") and data is not None else []

    known = {"model": bool(before.get("weights")), "dataset": bool(before.get("data"))}
    changes = {"model": model_changes, "dataset": data_changes() if "dataset" in moved else []}
    _check_settings(saved, config, {flag for flag in moved if known[flag] and not changes[flag]}, changes)
    _check_model([change for change in model_changes if change != _OTHER_WEIGHTS], config.run, config.model)
    _check_data(data_changes(), config)


def reads_data(run: RunConfig, found: Path | None) -> bool:
    """Return whether this start of a run reads data: a reshape neither trains nor evaluates, so it needs none.

    Args:
        run: how long it trains, and whether it evaluates.
        found: the checkpoint to start from.
    """
    stop, knows_length = run.stop_after, run.steps is not None
    if found is None or run.evaluate or stop is None or step_of(found) < stop:
        return True
    return not (knows_length or "num_steps" in read_trainer_state(found)["record"])


def _check_settings(saved: dict[str, Any], config: Config, may_differ: set[str], within: dict[str, list[str]]) -> None:
    """Refuse settings that differ. ``within`` lists, by setting, what changed in the model or data that it names."""
    now = json.loads(json.dumps(config.flat()))
    free = FREE_ON_RESUME | may_differ
    if config.optimizer.schedule == "constant":
        free |= {"steps", "epochs"}
    differing = [name for name in now if name not in free and saved.get(name) != now[name]]
    if not differing:
        return
    inner = {name: f" ({', '.join(within[name])})" if within.get(name) else "" for name in differing}
    changes = "; ".join(f"{name} was {saved.get(name)!r}, now {now[name]!r}{inner[name]}" for name in differing)
    why = ""
    if {"steps", "epochs"} & set(differing):
        why = (
            f"The {config.optimizer.schedule} schedule depends on the number of steps: with a different number, every "
            "learning rate so far would have been different. Only a run that began with schedule='constant' may get "
            "more steps. "
        )
    raise ConfigError(
        f"Run {config.run.name!r} cannot resume with different settings: {changes}. {why}"
        f"Write the old values, or give the new run another name. {_export_advice(config)}"
    )


def _check_is_resumable(saved: dict[str, Any], config: Config) -> None:
    """Refuse a checkpoint that only holds weights, and a run that cannot load any checkpoint."""
    if saved.get("shard_at_load"):
        raise ConfigError(
            f"Run {config.run.name!r} has a checkpoint of a model that was sharded at load (shard_at_load=True). "
            f"{NO_RESUME}, but training cannot continue from them. Give the new run another name. "
            f"{_export_advice(config)}"
        )
    if config.engine.shard_at_load:
        raise ConfigError(
            f"Run {config.run.name!r} has a checkpoint, but shard_at_load=True cannot resume. {NO_RESUME}. Leave "
            "shard_at_load out, or give the new run another name."
        )


def _check_shape(saved: dict[str, Any], config: Config) -> None:
    """Refuse a different shape if the Hugging Face Trainer saved the checkpoint, or would have to load it."""
    before, now = shape(saved), shape(config.flat())
    if "trainer" in (before["engine"], now["engine"]) and before != now:
        names = [name for name in before | now if before.get(name) != now.get(name)]
        changes = "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise ConfigError(
            f"Run {config.run.name!r} cannot resume in a different shape: {changes}. The Hugging Face Trainer reads "
            "only its own checkpoints, in the shape they were saved in, and no other engine reads those. Write the "
            "old values. " + _export_advice(config)
        )


def _export_advice(config: Config) -> str:
    return (
        f"To start a new run from its weights: `python -m tutorial_lib export {config.directory} DIR`, then write "
        "model='DIR' and another name."
    )


def identity(config: ModelConfig) -> dict[str, Any]:
    """Identify a run's model and tokenizer by their content rather than their names.

    Returns:
        ``model``: entries of its configuration that are not defaults; ``tokenizer``: SHA-256 of everything that decides
        the ids of a text; ``vocabulary``: its number of tokens; ``weights``: for a model in a directory, SHA-256 of
        its weight files' sizes and their first and last MiB (otherwise None: a hub model is assumed not to change).

    Raises:
        ConfigError: there is no such model.
    """
    options = {"trust_remote_code": config.trust_remote_code}
    model = load_trained_config(config.name, random_init=config.random_init, **options).to_diff_dict()
    tokenizer = load_tokenizer(config.name, **options)
    return {
        "model": {name: value for name, value in json.loads(json.dumps(model)).items() if name not in _INCIDENTAL},
        "tokenizer": hashlib.sha256(_tokenizer_rules(tokenizer).encode()).hexdigest(),
        "vocabulary": len(tokenizer),
        "weights": _sample_weights(resolve_model(config.name)),
    }


_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation")


def _tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else {"vocab": tokenizer.get_vocab()}
    # These two only record how the last text was cut and padded.
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    return json.dumps([type(tokenizer).__name__, rules, tokenizer.special_tokens_map], sort_keys=True, default=str)


_SAMPLE = 2**20


def _sample_weights(target: str) -> str | None:
    """Hash samples of a model's weight files: enough to tell two models apart, however large the files are."""
    if not Path(target).is_dir():
        return None
    found = hashlib.sha256()
    for path in locate_weights(target, local_files_only=True):
        size = path.stat().st_size
        with path.open("rb") as file:
            found.update(f"{path.name} {size} ".encode() + file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            found.update(file.read())
    return found.hexdigest()


_OTHER_WEIGHTS = "its weights are different"


def _model_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between two identities of a model."""
    then, is_now = before["model"], now["model"]
    changes = [
        f"{key} was {then.get(key, 'the default')!r}, now {is_now.get(key, 'the default')!r}"
        for key in sorted({*then, *is_now})
        if then.get(key) != is_now.get(key)
    ]
    if before["tokenizer"] != now["tokenizer"]:
        changes.append(
            "another tokenizer, which gives the same text different ids "
            f"(it had {before['vocabulary']} tokens, now {now['vocabulary']})"
        )
    if before.get("weights") and before["weights"] != now["weights"]:
        changes.append(_OTHER_WEIGHTS)
    return changes


def _data_changes(before: dict[str, str], now: dict[str, str], config: DataConfig) -> list[str]:
    """Return the splits that both starts read and whose tokens differ."""
    splits = {"train": config.train_split, "eval": config.eval_split}
    changed = [splits[use] for use in splits if use in before and use in now and before[use] != now[use]]
    return [f"split {split!r} has different tokens" for split in changed]


def _check_model(changes: list[str], run: RunConfig, model: ModelConfig) -> None:
    if changes:
        raise ConfigError(
            f"Run {run.name!r} cannot resume with a model that differs from its checkpoint's: "
            f"{'; '.join(changes)}. Restore {model.name!r} as it was, or give the new run another name."
        )


def _check_data(changes: list[str], config: Config) -> None:
    if changes:
        raise ConfigError(
            f"Run {config.run.name!r} cannot resume with different data: in {config.data.name!r}, "
            f"{' and '.join(changes)} than when the checkpoint was saved. Restore the old data, or give the new run "
            "another name. " + _export_advice(config)
        )
