"""Compatibility between a checkpoint and the run that wants to resume from it, checked before any process starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tutorial_lib.checkpoint.manifest import read_trainer_state
from tutorial_lib.config import FREE_ON_RESUME, Config, ConfigError
from tutorial_lib.models import load_tokenizer, load_trained_config

_SHAPE = {
    "torch": (),
    "fsdp": ("sharding", "shard_size", "offload"),
    "deepspeed": ("zero_stage", "offload", "deepspeed"),
}


def shape(flat: dict[str, Any]) -> dict[str, Any]:
    """The settings, by their flat names, that decide which rank holds what of a run's state, and saves it how."""
    return {name: flat[name] for name in ("engine", "device", "dp", "tp", *_SHAPE[flat["engine"]])}


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Refuse to continue a run under settings that would make other updates of it.

    The number of ranks, the engine, the ZeRO stage and all else that decides where the state lies may change.

    Raises:
        ConfigError: names every setting that differs, and both values.
    """
    now = json.loads(json.dumps(config.flat()))
    free = set(FREE_ON_RESUME)
    if config.optimizer.schedule == "constant":
        free |= {"steps", "epochs"}
    differing = [
        f"{name} was {saved.get(name)!r}, now {now[name]!r}"
        for name in now
        if name not in free and saved.get(name) != now[name]
    ]
    if differing:
        raise ConfigError(
            f"Run {config.run.name!r} cannot go on with other settings: {'; '.join(differing)}. "
            "Write the old values, or give the new run another name."
        )


def check_continues(config: Config, found: Path) -> None:
    """Refuse to continue a run from a checkpoint that it must not, or cannot, continue.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: its settings, its model or its tokenizer are others, or ``resume='never'`` forbids to touch it.
    """
    if config.run.resume == "never":
        raise ConfigError(
            f"Run {config.run.name!r} has the checkpoint {found}, and resume='never' forbids to continue it. "
            "Choose another name, or write resume='auto'."
        )
    saved = read_trainer_state(found)
    check_same_run(saved["config"], config)
    _check_identity(saved.get("identity", {}), config)


def identity(config: Config) -> dict[str, Any]:
    """What a run's model and tokenizer are, whatever their name: a checkpoint fits no others.

    Returns:
        ``model``: the configuration's entries that are not defaults; ``tokenizer``: SHA-256 of all that decides which
        ids a text becomes; ``vocabulary``: how many tokens it has.

    Raises:
        ConfigError: there is no such model.
    """
    options = {"trust_remote_code": config.model.trust_remote_code}
    model = load_trained_config(config.model.name, random_init=config.model.random_init, **options).to_diff_dict()
    tokenizer = load_tokenizer(config.model.name, **options)
    return {
        "model": {name: value for name, value in json.loads(json.dumps(model)).items() if name not in _OF_THE_MOMENT},
        "tokenizer": hashlib.sha256(_rules(tokenizer).encode()).hexdigest(),
        "vocabulary": len(tokenizer),
    }


_OF_THE_MOMENT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation")


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else {"vocab": tokenizer.get_vocab()}
    # How the last text happened to be cut and padded.
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    return json.dumps([type(tokenizer).__name__, rules, tokenizer.special_tokens_map], sort_keys=True, default=str)


def _check_identity(saved: dict[str, Any], config: Config) -> None:
    if not saved:
        return  # format 1 did not keep it
    now, name = identity(config), config.run.name
    next_step = f"Put back what {config.model.name!r} was, or give the new run another name."
    before = saved["model"]
    differing = sorted(key for key in {*before, *now["model"]} if before.get(key) != now["model"].get(key))
    if differing:
        changes = (f"{key} was {before.get(key, 'the default')!r}, now {now['model'].get(key, 'the default')!r}"
                   for key in differing)  # fmt: skip
        raise ConfigError(
            f"Run {name!r} cannot go on with another model than the one of its checkpoint: {'; '.join(changes)}. "
            + next_step
        )
    if saved["tokenizer"] != now["tokenizer"]:
        raise ConfigError(
            f"Run {name!r} cannot go on with another tokenizer than the one of its checkpoint, which makes other ids "
            f"of the same text (it had {saved['vocabulary']} tokens, now {now['vocabulary']}). {next_step}"
        )
