"""Configuration of a run: one frozen tree of dataclasses, three profiles, and validation.

A :class:`Config` describes a run completely. Profiles (``cpu``, ``gpu``, ``cluster``) differ in *values* only; the code
that reads them is the same everywhere. Every field has a *flat* name (its command-line flag, with underscores), so
that ``Config.create("cpu", zero_stage=2, dataset="embedded/qa")``, a notebook's parameters and
``python -m tutorial_lib train --zero-stage 2 --dataset embedded/qa`` say the same thing.

This module imports only the standard library, so that planners, launchers and schedulers can read a configuration
without loading torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from tutorial_lib.config.checks import check_length, check_used, validate
from tutorial_lib.config.fields import (
    ENGINES,
    ConfigError,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Setting,
)
from tutorial_lib.config.profiles import PROFILE_VALUES
from tutorial_lib.config.workshop import SUBSET

__all__ = [
    "ENGINES",
    "FREE_ON_RESUME",
    "PROFILES",
    "START_ONLY",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "Setting",
    "settings",
]

PROFILES = tuple(PROFILE_VALUES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run depends on. Build it with :meth:`create`, vary it with :meth:`override`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Flat names of the settings that the caller gave to :meth:`create` or :meth:`override`, beyond the profile's."""

    def __post_init__(self) -> None:
        validate(self, settings())

    @classmethod
    def create(cls, profile: str = "cpu", **flat: Any) -> Config:
        """Build a profile's configuration with some settings replaced, named as on the command line.

        Raises:
            ConfigError: the profile or a setting is unknown, or the combination cannot run.
        """
        if profile not in PROFILES:
            raise ConfigError(f"profile {profile!r} is not known. Write one of: {', '.join(PROFILES)}.")
        return _mark_given(_build(PROFILE_VALUES[profile] | flat, base=None), flat)

    def override(self, **flat: Any) -> Config:
        """Return a copy with some settings replaced, named as on the command line.

        Raises:
            ConfigError: a setting is unknown, or the combination cannot run.
        """
        return _mark_given(_build(flat, base=self), flat)

    def replaced(self, **flat: Any) -> Config:
        """Return a copy with some settings replaced by derived values, without marking them as given by the caller."""
        return _build(flat, base=self)

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass on one rank."""
        return self.run.micro_batch or self.run.global_batch // self.parallel.dp

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step on one rank."""
        return self.run.global_batch // (self.parallel.dp * self.micro_batch)

    @property
    def directory(self) -> Path:
        """Directory of the run's records and checkpoints: ``storage/name``."""
        return Path(self.run.storage).expanduser() / self.run.name

    def with_absolute_paths(self) -> Config:
        """Return a copy with absolute paths, for processes that start in a different directory, as Ray's workers do."""
        names = {"storage": self.run.storage, "model": self.model.name, "dataset": self.data.name}
        if self.engine.deepspeed_file:
            names["deepspeed"] = self.engine.deepspeed_file
        paths = {flag: Path(name).expanduser() for flag, name in names.items()}
        # A plain file that happens to be called gpt2 does not make the hub's gpt2 a path.
        is_path = {
            "storage": lambda p: True,
            "deepspeed": Path.is_file,
            "model": Path.is_dir,
            "dataset": lambda p: p.is_dir() or (p.is_file() and p.suffix),
        }
        return self.replaced(**{flag: str(p.resolve()) for flag, p in paths.items() if is_path[flag](p)})

    def flat(self) -> dict[str, Any]:
        """Return all settings by flat name."""
        return {s.flag: getattr(getattr(self, s.section), s.field) for s in settings().values()}

    def to_json(self) -> str:
        return json.dumps(self.flat(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Build a configuration from the text of :meth:`to_json`. Its row limits count as given by the caller.

        Raises:
            ConfigError: the text is not a JSON object, or its settings are unknown or cannot run.
        """
        try:
            flat = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"The configuration is not valid JSON: {error}.") from error
        if not isinstance(flat, dict):
            raise ConfigError(f"The configuration is a JSON {type(flat).__name__}, not an object.")
        config = _build({k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}, base=None)
        return dataclasses.replace(config, given=frozenset(SUBSET.keys() & flat.keys()))


@cache
def settings() -> dict[str, Setting]:
    """Return all settings by flat name, in the order in which they are declared."""
    found: dict[str, Setting] = {}
    sections = {name: kind for name, kind in get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    for section, section_type in sections.items():
        hints = get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            flag = item.metadata["flag"] or item.name
            found[flag] = Setting(
                section=section,
                field=item.name,
                type=hints[item.name],
                default=item.default,
                **{**item.metadata, "flag": flag},
            )
    return found


def _build(flat: dict[str, Any], base: Config | None) -> Config:
    known = settings()
    sections: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"There is no setting {name!r}.{hint} The settings are: {', '.join(known)}.")
        sections.setdefault(known[name].section, {})[known[name].field] = value
    start = base or Config()
    return dataclasses.replace(
        start, **{s: dataclasses.replace(getattr(start, s), **values) for s, values in sections.items()}
    )


def _mark_given(config: Config, flat: dict[str, Any]) -> Config:
    """Mark settings as given by the caller; refuse those that would be ignored, and a warm-up that outlasts the run."""
    config = dataclasses.replace(config, given=config.given | flat.keys())
    check_used(config, {name: settings()[name] for name in flat})
    check_length(config)
    return config


FREE_ON_RESUME = frozenset(name for name, setting in settings().items() if setting.resume != "fixed")
"""Flat names of settings that a resumed run may change."""

START_ONLY = frozenset(name for name, setting in settings().items() if setting.resume == "one start")
"""Flat names of settings that describe a single start of a run. A reshape, which trains no steps, sets them itself."""
