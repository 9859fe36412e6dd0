"""Trial of an engine: each rank trains a tiny copy for two steps before the model's weights are read.

Engines change a model in ways that its family's code may not expect. ZeRO-3 hides the shapes of parameters, and DDP
waits for a gradient of every parameter. The trial builds the configured engine for the copy of
:mod:`tutorial_lib.engine.trial_forward`, evaluates, takes two steps, and reports a failure in this package's words.

It takes 0.1 to 0.7 CPU seconds per rank (measured once; ZeRO-3 takes the most), so families that the tests train with
every engine skip it.

For ``engine="trainer"`` with a DeepSpeed file, this package's own engine tries the file's ZeRO stage. With
``shard_at_load``, the copy is loaded as the model will be, and its logits must not change. The plain Trainer needs no
trial: it does not change the model, whose code and loss :mod:`tutorial_lib.engine.trial_forward` has already run, and
its DDP looks for parameters without a gradient, unless activations are recomputed.
"""

from __future__ import annotations

import fnmatch
import logging
import shutil
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_model
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tutorial_lib.config import Config, ConfigError, EngineConfig, ParallelConfig
from tutorial_lib.engine.protocol import Engine
from tutorial_lib.engine.single import model_inputs
from tutorial_lib.engine.trial_forward import NoCopyError, TinyCopy, differ
from tutorial_lib.models import build_model, check_tensor_parallel, load_config
from tutorial_lib.mpu.collectives import all_gather_objects
from tutorial_lib.records import lost_another_rank

_LOG = logging.getLogger(__name__)

TESTED_FAMILIES = frozenset({"bloom", "gpt2", "qwen2"})
"""Families of the embedded models, which the tests train with every engine."""

_LARGEST_VECTOR = 1000
"""Upper limit of the copy's persistence threshold: ZeRO-3 must split its matrices, as it splits the model's."""


def train_copy(config: Config, build: Callable[[Config], Engine]) -> None:
    """Refuse a model whose family the configured engine cannot train. Collective.

    Args:
        config: what to run, with the values of its DeepSpeed file applied.
        build: function that builds the engine of a configuration.

    Raises:
        ConfigError: names the family, the engine and the reason, and what to try instead.
    """
    m = config.model
    model_config = load_config(m.name, trust_remote_code=m.trust_remote_code)
    if model_config.model_type in TESTED_FAMILIES and not hasattr(model_config, "auto_map"):
        return
    at_load = config.engine.shard_at_load
    if config.engine.name == "trainer" and not config.engine.deepspeed_file and not at_load:
        return
    with ExitStack() as stack:
        written = _written_copy(config, model_config, stack)
        if not all(all_gather_objects(written is not None)):  # a rank whose disk is full would leave the others waiting
            return
        assert written is not None
        tiny, directory = written
        batch = tiny.batch(tiny.documents(), config.data.batching)
        try:
            copied = _copy_config(config, tiny, directory)
            engine = _SplitAtLoad(copied) if at_load else build(copied)
            logits = _take_steps(engine, batch)
        except ConfigError:
            return  # a setting that does not suit the copy may suit the model, which was checked before the start
        except Exception as error:
            if _is_machine_error(error):
                raise
            _LOG.warning("A tiny copy of %r failed:", m.name, exc_info=error)
            raise _refusal(config, model_config.model_type, error) from error
    if at_load:
        changed = differ(logits.cpu(), tiny.forward(model_inputs(batch, torch.device("cpu"))))
        if any(all_gather_objects(changed)):  # all ranks raise, so that none waits for the others
            refused, others = _engine_and_others(config.engine, config.parallel)
            raise ConfigError(
                f"The model {m.name!r}, of type {model_config.model_type!r}, cannot be trained with {refused}: its "
                f"logits change when transformers splits it. Try {others}. (Found with a tiny copy of the model, "
                "before its weights were read.)"
            )
    engine.close()


class _SplitAtLoad:
    """The copy, split by transformers as it loads, with the part of the engine protocol that a trial needs."""

    def __init__(self, config: Config) -> None:
        self.module = build_model(config)
        self._optimizer = torch.optim.AdamW([each for each in self.module.parameters() if each.requires_grad])

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.module(**model_inputs(batch, self.module.device), use_cache=False).logits
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None: ...


def _written_copy(config: Config, model_config: PretrainedConfig, stack: ExitStack) -> tuple[TinyCopy, str] | None:
    """Return a tiny copy and the directory that it was written into, which the stack removes.

    Return None if there is no copy, if it is only part of a larger model, or if it cannot be split or written.
    """
    try:
        tiny = TinyCopy.of(config, model_config)
    except NoCopyError:
        return None
    own_config = tiny.model.config
    if own_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hasattr(own_config, "auto_map"):
        return None  # part of a larger model
    try:
        check_tensor_parallel(config.parallel.tp, own_config)
        # On a network file system, a file that the engine still maps cannot be removed at once.
        temporary = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        source = Path(config.model.name)
        # transformers caches a model's code by the name of its directory, so the copy's directory has the same name.
        directory = str(Path(temporary, source.name))
        Path(directory).mkdir()
        if source.is_dir():
            for code in source.rglob("*.py"):
                target = Path(directory, code.relative_to(source))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(code, target)
        tiny.model.config.save_pretrained(directory)
        save_model(tiny.model, str(Path(directory, "model.safetensors")))  # save_pretrained writes on rank 0 only
    except (ConfigError, OSError, SafetensorError, StrictDataclassError):
        # StrictDataclassError means that the copy's sizes break a rule of its configuration class.
        return None
    return tiny, directory


def _copy_config(config: Config, tiny: TinyCopy, directory: str) -> Config:
    """Return the copy's configuration: one micro-batch per step, and the ``freeze`` patterns that match."""
    engine = "deepspeed" if config.engine.deepspeed_file else config.engine.name
    batch = config.micro_batch * config.parallel.dp
    names = [name for name, _ in tiny.model.named_parameters(remove_duplicate=False)]
    freeze = tuple(pattern for pattern in config.model.freeze if fnmatch.filter(names, pattern))
    threshold = min(config.engine.persistence_threshold, _LARGEST_VECTOR)
    return config.replaced(
        model=directory, engine=engine, deepspeed=None, freeze=freeze, global_batch=batch,
        persistence_threshold=threshold,
    )  # fmt: skip


def _take_steps(engine: Engine | _SplitAtLoad, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate, take two steps, and return the logits of the evaluation."""
    engine.train(False)
    with torch.no_grad():
        logits = engine.forward(batch)
    engine.train(True)
    for _ in range(2):
        engine.backward(engine.forward(batch).float().mean())
        engine.step()
    return logits


def _is_machine_error(error: Exception) -> bool:
    """Return whether memory, files, devices, the network or a compiler failed, rather than the model's code."""
    kinds = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
    if isinstance(error, kinds) or lost_another_rank({"message": str(error)}):
        return True
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(file.name == "cpp_extension.py" or file.parent.name == "op_builder" for file in files)


def _refusal(config: Config, family: str, error: Exception) -> ConfigError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "/".join(last.filename.split("site-packages/")[-1].split("/")[-4:])
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    engine, other = _engine_and_others(config.engine, config.parallel)
    return ConfigError(
        f"The model {config.model.name!r}, of type {family!r}, cannot be trained with {engine}: {where}, line "
        f"{last.lineno}, fails with {type(error).__name__}: {reason}. Try {other}. (Found with a tiny copy of the "
        "model, before its weights were read; the run's logs have the traceback.)"
    )


def _engine_and_others(e: EngineConfig, parallel: ParallelConfig) -> tuple[str, str]:
    """Return the engine's settings as a user writes them, and others to try."""
    split = f" and tp={parallel.tp}" if parallel.tp > 1 else ""
    whole = "tp=1, " if split else ""
    if e.shard_at_load:
        return "engine='trainer', shard_at_load=True", "shard_at_load=False, or engine='deepspeed'"
    if e.name == "torch":
        return "engine='torch'", "another model"
    if e.name == "fsdp":
        fewer = "full_shard" if e.sharding == "no_shard" else "no_shard"
        others = f"{whole}sharding={fewer!r}, or engine='deepspeed'"
        return f"engine='fsdp', sharding={e.sharding!r}{split}", others
    lower = "zero_stage=2, " if e.zero_stage == 3 else ""
    return f"engine={e.name!r}, zero_stage={e.zero_stage}{split}", f"{whole}{lower}or engine='fsdp'"
