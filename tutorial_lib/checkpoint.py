"""Checkpoints: saved by every rank, visible only when whole, verified before anything is unpickled.

A checkpoint is the directory ``checkpoints/step-NNNNNNNN`` of a run::

    engine/            what the engine writes: each rank its own shard
    rank-NNN.pt        this rank's random-number states and its position in the data
    model/             configuration and tokenizer, so that an export needs nothing else
    trainer.json       step, learning-rate schedule, settings, versions
    manifest.json      every file with its size and SHA-256; written last

It is written under a name that nobody reads and renamed when the manifest is complete, so an interrupted save leaves
the previous checkpoint the newest one. The engine's files are pickles, FSDP2's ``.metadata`` among them: unpickling
runs code, so only load checkpoints that you or your job wrote. The manifest protects against damage, not against
forgery.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tutorial_lib import autotp
from tutorial_lib.config import FREE_ON_RESUME, Config, ConfigError
from tutorial_lib.fused import by_part, is_fused_by_part
from tutorial_lib.models import freeze_parameters
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory, write_atomically

T = TypeVar("T")

MANIFEST = "manifest.json"
LAYOUT = "layout.json"
"""Among the files of an engine that splits parameters over tensor-parallel ranks: how each of them was split."""

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another run. The message names the file and the next step."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a resumed run needs besides the engine's own state.

    Attributes:
        step: optimizer steps done.
        loader: this rank's data position, as the loader gives it.
        scheduler: the learning-rate schedule's state.
        record: what the trainer wants to find again (JSON).
    """

    step: int
    loader: dict[str, Any]
    scheduler: dict[str, Any]
    record: dict[str, Any]


def directory_of(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def latest(run: RunDirectory) -> Path | None:
    """The newest checkpoint that was completely written, or ``None`` for a run that has saved nothing.

    Raises:
        CheckpointError: a checkpoint directory exists but has lost its manifest.
    """
    found = sorted(run.checkpoints.glob("step-*"))
    if not found:
        return None
    if not (found[-1] / MANIFEST).is_file():
        raise CheckpointError(
            f"{found[-1]} has no {MANIFEST}: it was not written by this package, or a file was removed. "
            f"Delete that directory to go on from the checkpoint before it."
        )
    return found[-1]


def save(
    run: RunDirectory, engine: Any, config: Config, topology: Topology, progress: Progress, tokenizer: Any
) -> Path:
    """Write a checkpoint. Collective; returns when it is complete and visible to all ranks.

    Args:
        run: the run's directory, on storage that every rank sees.
        engine: anything with ``save(directory)`` and ``module``.
        config: settings of the run, kept for the resume to compare.
        topology: this rank's place in the grid.
        progress: step, data position, schedule.
        tokenizer: saved beside the model's configuration, for exports.

    Raises:
        CheckpointError: some rank's files are not visible here: the storage is not shared.
    """
    final = directory_of(run, progress.step)
    partial = run.checkpoints / f".partial-{final.name}"
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    engine.save(partial / "engine")
    torch.save(
        {"loader": progress.loader, "random": _random_states(engine)},
        partial / f"rank-{topology.rank:03d}.pt",
    )
    if topology.rank == 0:
        engine.module.config.save_pretrained(partial / "model")
        tokenizer.save_pretrained(partial / "model")
        trainer = {
            "format": FORMAT,
            "step": progress.step,
            "scheduler": progress.scheduler,
            "record": progress.record,
            "config": config.flat(),
            "world_size": topology.world_size,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
        }
        (partial / "trainer.json").write_text(json.dumps(trainer, indent=2), encoding="utf-8")
    _barrier()
    files = _digests(partial, topology)
    if topology.rank == 0:
        missing = [r for r in range(topology.world_size) if f"rank-{r:03d}.pt" not in files]
        if missing:
            raise CheckpointError(
                f"The files of ranks {missing} are not visible in {partial}. The storage must be one that every node "
                "sees, such as a network file system: choose another --storage."
            )
        write_atomically(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        _sync(partial / MANIFEST)
        _sync(partial)
        # A save of the same step by an earlier start of this run is replaced as a whole.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(run.checkpoints)
    _barrier()
    return final


def load(path: Path, engine: Any, config: Config, topology: Topology) -> Progress:
    """Verify a checkpoint, then restore the engine and this rank's random-number states. Collective.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the checkpoint belongs to other settings.
    """
    verify(path, topology)
    trainer = read_trainer_state(path)
    check_same_run(trainer["config"], config)
    own = torch.load(path / f"rank-{topology.rank:03d}.pt", weights_only=True)
    engine.load(path / "engine")
    _restore_random_states(own["random"], engine)
    return Progress(trainer["step"], own["loader"], trainer["scheduler"], trainer["record"])


def read_trainer_state(path: Path) -> dict[str, Any]:
    """What ``trainer.json`` of a checkpoint holds.

    Raises:
        CheckpointError: not there, or of a format that this version does not know.
    """
    try:
        trainer = dict(json.loads((path / "trainer.json").read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / 'trainer.json'} cannot be read: {error}. {_next_step(path)}") from error
    if trainer.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {trainer.get('format')}; this version reads format {FORMAT}.")
    return trainer


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Refuse to continue a run under settings that would make other updates of it.

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
        ConfigError: its settings are others, or ``resume='never'`` forbids to touch it.
    """
    if config.run.resume == "never":
        raise ConfigError(
            f"Run {config.run.name!r} has the checkpoint {found}, and resume='never' forbids to continue it. "
            "Choose another name, or write resume='auto'."
        )
    check_same_run(read_trainer_state(found)["config"], config)


def verify(path: Path, topology: Topology | None = None) -> None:
    """Compare every file with the manifest. With a topology the work is shared out, and all ranks learn the outcome.

    Raises:
        CheckpointError: names the first missing or altered file.
    """
    rank, size = (topology.rank, topology.world_size) if topology else (0, 1)
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}. {_next_step(path)}") from error
    problem = next(filter(None, (_damage(path / n, files[n]) for n in sorted(files)[rank::size])), None)
    if topology and size > 1:
        problems: list[str | None] = [None] * size
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    if problem:
        raise CheckpointError(f"{problem} {_next_step(path)}")


def export(path: Path, target: Path) -> Path:
    """Write a checkpoint's weights as a Hugging Face directory that ``from_pretrained`` loads.

    One process, no GPU: the shards of any ZeRO stage, of FSDP2 and of any tensor-parallel size are merged on the CPU.
    Under mixed precision the fp32 master weights are exported, not their 16-bit copies.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: ``target`` already holds something.
    """
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty. Name a new directory for the export.")
    verify(path)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings = Config.from_json(json.dumps(read_trainer_state(path)["config"]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path / "model"), dtype=torch.float32)
    weights = _whole_weights(path / "engine", settings, model)
    # Tied weights may be stored under one of their names only: assign what is there, tie, and see that all is there.
    outcome = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    lost = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if lost or outcome.unexpected_keys:
        raise CheckpointError(
            f"{path} does not fit its own model configuration: missing {lost}, unexpected {outcome.unexpected_keys}."
        )
    model.config.use_cache = True  # off while training; whoever loads the export wants to generate
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(path / "model").save_pretrained(target)
    return target


def _whole_weights(directory: Path, settings: Config, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if settings.engine.name == "torch":
        return dict(torch.load(directory / "model.pt", map_location="cpu", weights_only=True))
    if settings.engine.name == "fsdp":
        return _whole_weights_of_fsdp(directory, settings.parallel.tp, model)
    freeze_parameters(model, settings.model.freeze)
    if settings.parallel.tp == 1:
        return _merged_over_dp(directory, settings, model)
    rows = json.loads((directory / LAYOUT).read_text(encoding="utf-8"))
    if settings.engine.zero_stage == 3:
        return autotp.merged_stage_3(directory, rows, settings.parallel.dp, settings.parallel.tp)
    shares = []
    for tp_rank in range(settings.parallel.tp):
        with autotp.as_if_alone(directory, tp_rank) as alone:
            shares.append(_merged_over_dp(alone, settings, model))
    return autotp.joined(shares, rows)


def _merged_over_dp(directory: Path, settings: Config, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    frozen = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    weights: dict[str, torch.Tensor] = {}
    if settings.engine.zero_stage > 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it prints what it does, and a bar per loop
            weights = dict(get_fp32_state_dict_from_zero_checkpoint(str(directory), tag="engine"))
    if settings.engine.zero_stage == 3:
        return weights
    # Verified above; DeepSpeed's own file holds more than tensors.
    state = torch.load(directory / "engine" / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    if settings.engine.zero_stage > 0:
        # What is not trained is in no shard of the optimizer, and at stage 1 DeepSpeed's merge leaves it out.
        return weights | {name: state["module"][name].float() for name in frozen if name not in weights}
    weights = {name: tensor.float() for name, tensor in state["module"].items()}
    if settings.engine.precision != "fp32":
        # Without ZeRO, DeepSpeed keeps the masters without names, in the order of the trained parameters.
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        masters = [master.detach() for group in state["optimizer"]["fp32_groups"] for master in group]
        weights.update(zip(trained, masters, strict=True))
    return weights


def _whole_weights_of_fsdp(directory: Path, tp: int, model: Any) -> dict[str, torch.Tensor]:
    # DCP reads its metadata, a pickle, and finds the parts of every tensor in it: verified above.
    weights = {name: torch.empty(parameter.shape) for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*load in a single process")  # that is the intent
        dcp.load({"parameters": weights}, checkpoint_id=str(directory), no_dist=True)
    return {
        name: by_part(tensor, tp).contiguous() if is_fused_by_part(name, model.config.model_type) else tensor
        for name, tensor in weights.items()
    }


def _digests(directory: Path, topology: Topology) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, each rank syncing and reading a share of them."""
    # One rank lists: on a network file system others may still see an older listing.
    names = agreed(sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()))
    mine = names[topology.rank :: topology.world_size]
    for name in mine:
        # Else a power cut after the rename could leave a checkpoint that has its name and not its content.
        _sync(directory / name)
    own = {name: _digest(directory / name) for name in mine}
    if topology.world_size == 1:
        return own
    shares: list[dict[str, dict[str, Any]]] = [{}] * topology.world_size
    dist.all_gather_object(shares, own)
    return {name: entry for share in shares for name, entry in share.items()}


def _sync(path: Path) -> None:
    """Have a file's content, or a directory's entries, on the disk itself before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing from the checkpoint."
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, but {entry['bytes']} were written."
    if _digest(path)["sha256"] != entry["sha256"]:
        return f"{path} was altered after it was written (its SHA-256 differs)."
    return None


def _next_step(path: Path) -> str:
    return f"Nothing was loaded. Delete {path} to go on from the checkpoint before it, or restore its files."


def _random_states(engine: Any) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return states


def _restore_random_states(states: dict[str, Any], engine: Any) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], engine.device)


def agreed(value: T) -> T:
    """Rank 0's value, on every rank. Collective."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def check_storage(config: Config) -> None:
    """Refuse storage that cannot be written to, before any process starts.

    Raises:
        ConfigError: names the directory and the reason.
    """
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"storage {config.run.storage!r} cannot be written to: {error.strerror}. "
            "Name a directory that every rank can write to."
        ) from error
