"""Side files of a model: its original tokenizer, generation settings and cache setting.

Training changes some of them: it pads on the right, gives GPT-2's tokenizer a pad token, and turns the generation cache
off. Checkpoints and exports must keep the originals.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from tutorial_lib.models.directory import GENERATION_CONFIG, check_generation_config
from tutorial_lib.models.loading import fetch, is_local, load_config, resolve_model


@dataclass(frozen=True, slots=True)
class SideFiles:
    """A model's files besides its weights and dimensions.

    Attributes:
        tokenizer: as ``from_pretrained`` returns it, without the changes of :func:`tutorial_lib.models.load_tokenizer`.
        generation_config: the text of ``generation_config.json``, or None if the model has none.
        use_cache: the original setting in ``config.json``.
    """

    tokenizer: PreTrainedTokenizerBase
    generation_config: str | None
    use_cache: bool

    def save(self, directory: Path, model_config: PretrainedConfig) -> None:
        """Write these files, and the configuration of the trained model, into a directory."""
        own = copy.deepcopy(model_config)
        own.use_cache = self.use_cache
        own.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        if self.generation_config is not None:
            (directory / GENERATION_CONFIG).write_text(self.generation_config, encoding="utf-8")


def check_side_files(name: str) -> None:
    """Refuse a directory whose ``generation_config.json`` is not valid. Hub models are not checked.

    Raises:
        ConfigError: names the file, what is wrong with it, and what to do.
    """
    if is_local(name):
        check_generation_config(resolve_model(name))


def load_side_files(name: str, *, trust_remote_code: bool = False) -> SideFiles:
    """Read a model's side files.

    Raises:
        ConfigError: there is no such model, or it has no tokenizer.
    """
    options = {"trust_remote_code": trust_remote_code}
    tokenizer = fetch(AutoTokenizer.from_pretrained, "tokenizer", name, **options)
    for how_found in ("is_local", "local_files_only"):  # transformers would save them along with its settings
        tokenizer.init_kwargs.pop(how_found, None)
    generation_config = fetch(_read_generation_config, "model", name)
    use_cache = getattr(load_config(name, **options), "use_cache", True)
    return SideFiles(tokenizer, generation_config, use_cache)


def _read_generation_config(target: str, *, local_files_only: bool) -> str | None:
    options: dict[str, Any] = {"local_files_only": local_files_only, "_raise_exceptions_for_missing_entries": False}
    found = cached_file(target, GENERATION_CONFIG, **options)
    return Path(found).read_text(encoding="utf-8") if found else None
