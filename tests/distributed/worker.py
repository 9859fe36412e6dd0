"""Worker processes of these tests: the local launcher's worker, observed, and in some runs deliberately broken.

``python -m tests.distributed.worker`` takes the place of ``python -m tutorial_lib.launch.worker`` and calls it. At
every checkpoint a run leaves ``observed.pt`` in its directory: full parameters, full optimizer states, the examples
of every step. The names of some runs ask for more:

- ``broken-NAME``: the run trains with the patch that :data:`BROKEN` has under NAME;
- ``fsdp1-NAME``: PyTorch's first FSDP trains;
- ``whole.NAME``: at its end the engine is asked to load a directory that holds nothing;
- ``twice.NAME``: where it stops, it is started again, by the same processes; the second start is observed;
- ``late.NAME``: its background writes are late; where it stops, it is started again from the checkpoint before, by the
  same processes; the second start is observed;
- ``refused-NAME``: the run must fail, on every rank; the error is kept in ``refused.json``, and the launch goes on.
  It trains with the patch that :data:`BROKEN` has under NAME, if there is one;
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import cpuinfo
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from tests.distributed.fsdp1 import FSDP1Engine
from tests.late_writes import late_writes, without_snapshot
from tutorial_lib import checkpoint
from tutorial_lib import engine as engines
from tutorial_lib.checkpoint import writer
from tutorial_lib.config import Config
from tutorial_lib.dataloader import loaders
from tutorial_lib.dataloader.collate import Collate
from tutorial_lib.dataloader.sampler import StepSampler
from tutorial_lib.engine import fsdp
from tutorial_lib.engine.deepspeed import config as ds_config
from tutorial_lib.launch import worker
from tutorial_lib.launch.ray import train as ray_train
from tutorial_lib.measure.memory import StateBytes, count_allocations
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import consistency, count_targets, train
from tutorial_lib.trainer import loop as trainer

OBSERVATION = "observed.pt"


def main(*arguments: str) -> None:
    # DeepSpeed asks for the processor's maker, which takes a second, for every optimizer that it offloads.
    ask_once = mock.patch.object(cpuinfo, "get_cpu_info", functools.cache(cpuinfo.get_cpu_info))
    # Every run of a launch reads one of few data sets.
    read_once = mock.patch.object(loaders, "load_rows", functools.cache(loaders.load_rows))
    with ask_once, read_once:
        worker.main(*arguments, train=train_all_observed)


def train_all_observed(configs: Sequence[Config]) -> None:
    for config in configs:
        train_observed(config)


def train_observed(config: Config) -> None:
    """Train, and record everything that can be observed from outside the trainer."""
    probe_averages(Path(config.run.storage))
    if config.run.name.startswith("twice."):
        train(config)
        config = config.override(stop_after=None)
    if config.run.name.startswith("late."):
        with late_writes(), without_snapshot() if "without_snapshot" in config.run.name else nullcontext():
            train(config)
        _forget_newest(config)
        config = config.override(stop_after=None)
    with ExitStack() as patches:
        kind, _, rest = config.run.name.partition("-")
        if kind == "fsdp1":
            patches.enter_context(mock.patch.object(fsdp, "FSDPEngine", FSDP1Engine))
        watch = patches.enter_context(_watching())
        fault = rest.partition(".")[0]
        if kind == "broken" or (kind == "refused" and fault in BROKEN):
            patches.enter_context(BROKEN[fault]())

        def observe(path: Path, row: dict[str, Any]) -> None:
            observation = watch.observation()
            if config.run.name.startswith("whole."):
                observation["load_of_nothing"] = watch.load_of_nothing(config.directory / "nothing")
            if dist.get_rank() == 0:
                torch.save(observation, config.directory / OBSERVATION)

        if config.run.name.startswith("refused-"):
            _train_in_vain(config)
        else:
            train(config, on_checkpoint=observe)
    # The trainer collects garbage after every run; what is there after the first one need not be looked at again.
    gc.freeze()


def _forget_newest(config: Config) -> None:
    """Remove the checkpoint that was written when training stopped. Collective."""
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoint.latest(RunDirectory(config.directory)))
    dist.barrier()


def _train_in_vain(config: Config) -> None:
    try:
        train(config)
    except Exception as error:
        refused: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(refused, {"type": type(error).__name__, "message": str(error)})
        if dist.get_rank() == 0:
            (config.directory / "refused.json").write_text(json.dumps(refused))
            # What the launcher expects of a run that has ended: a result, and no error to take for that of a later run.
            (config.directory / "result.json").write_text("{}")
            RunDirectory(config.directory).clear_errors()
    else:
        raise AssertionError(f"{config.run.name} was trained")


def failing_on_ray(given: dict[str, Any]) -> None:
    """Train as Ray's workers do, but rank 1 fails in its second step."""
    step = trainer.Trainer.train_step

    def failing(self: Any, micro_batches: Any) -> Any:
        if dist.get_rank() == 1 and self.step == 1:
            raise ValueError("of rank 1 alone")
        return step(self, micro_batches)

    with mock.patch.object(trainer.Trainer, "train_step", failing):
        ray_train._worker(given)


def killed_on_ray(given: dict[str, Any]) -> None:
    """Train as Ray's workers do, but once kill rank 1 when it reports its second checkpoint to Ray."""
    tell, reports = ray_train.report, []
    struck = Path(json.loads(given["configs"][-1])["storage"]) / "struck-on-ray"

    def telling(row: dict[str, Any], path: Path) -> None:
        reports.append(path)
        if dist.get_rank() == 1 and len(reports) == 2 and not struck.exists():
            struck.write_text("")
            _killed()
        tell(row, path)

    with mock.patch.object(ray_train, "report", telling):
        ray_train._worker(given)


class _Watch:
    """Keeps the engine, and the batches that the loader yields."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.written: set[str] = set()
        self.steps: list[list[str]] = []
        self.tokens: list[int] = []

    def engine_built(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def building(*args: Any) -> Any:
            self.engine = build(*args)
            return self.engine

        return building

    def loader_built(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def building(*args: Any, **kwargs: Any) -> Any:
            loader = build(*args, **kwargs)
            steps = loader.steps

            def watched(start: int | None = None) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
                for step, micro_batches in steps(start):
                    self.inputs = self.inputs or {k: t[:2] for k, t in micro_batches[0].items() if k != "labels"}
                    self.steps.append([example for batch in micro_batches for example in _examples(batch)])
                    self.tokens.append(_own_tokens(micro_batches))
                    yield step, micro_batches

            loader.steps = watched
            return loader

        return building

    def save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def saving(content: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            self._writes(target)
            return save(content, target, *args, **kwargs)

        return saving

    def stream(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.distributed.checkpoint`` opens its files here, and gives ``torch.save`` parts of them."""

        def creating(file_system: Any, path: Any, mode: str) -> Any:
            if "w" in mode:
                self._writes(path)
            return create(file_system, path, mode)

        return creating

    def _writes(self, target: Any) -> None:
        path = target if isinstance(target, (str, Path)) else getattr(target, "name", None)
        parts = Path(path).parts if isinstance(path, (str, Path)) else ()
        if "checkpoints" in parts:
            # What follows checkpoints/.partial-step-NNNNNNNN-TOKEN.
            self.written.add("/".join(parts[parts.index("checkpoints") + 2 :]))

    def observation(self) -> dict[str, Any]:
        """Return the observation, the same on every rank, or raise. Collective."""
        parameters = dict(self.engine.full_parameters())
        moments = dict(self.engine.full_optimizer_states())
        everything = [*parameters.values(), *(m for both in moments.values() for m in both.values())]
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (self.steps, self.tokens, _digest(everything), sorted(self.written)))
        measuring = self.engine.config.run.measure
        # Ranks of one tensor-parallel group are adjacent, and read the same examples.
        readers = shares[:: self.engine.config.parallel.tp]
        self.engine.train(False)
        with torch.no_grad(), count_allocations() if measuring else nullcontext() as allocations:
            # A start that stops where it begins has read nothing.
            logits = self.engine.forward(self.inputs) if self.inputs else torch.empty(0)
        return {
            "parameters": parameters,
            "moments": moments,
            "inputs": self.inputs,
            "logits": logits.clone(),
            "evaluation": {
                "peak": allocations.peak["cpu"],
                "parameters_after": StateBytes.of(self.engine.model_states()).parameters,
            }
            if measuring
            else None,
            "examples": [
                sorted(e for rank in step for e in rank) for step in zip(*(s[0] for s in readers), strict=True)
            ],
            "tokens_by_rank": [tokens for _, tokens, _, _ in readers],
            "ranks_agree": len({digest for _, _, digest, _ in shares}) == 1,
            "files_by_rank": [files for _, _, _, files in shares],
        }

    def load_of_nothing(self, directory: Path) -> str:
        """Return the engine's error if there is nothing to load. Do not use the engine afterwards. Collective."""
        directory.mkdir(exist_ok=True)
        try:
            self.engine.load(directory)
        except checkpoint.CheckpointError as error:
            return str(error)
        return "nothing was loaded, and nothing was said"


@contextmanager
def _watching() -> Iterator[_Watch]:
    watch = _Watch()
    with (
        mock.patch.object(trainer, "build_engine", watch.engine_built(trainer.build_engine)),
        mock.patch.object(trainer, "build_train_loader", watch.loader_built(trainer.build_train_loader)),
        mock.patch.object(torch, "save", watch.save(torch.save)),
        mock.patch.object(FileSystem, "create_stream", watch.stream(FileSystem.create_stream)),
    ):
        yield watch


def _examples(batch: dict[str, Tensor]) -> list[str]:
    """Return a fingerprint of every row of a batch, without its padding."""
    mask = batch["attention_mask"]
    width = mask.sum(-1) if mask.dim() == 2 else torch.full((mask.size(0),), mask.size(-1))
    return [_digest([ids[:n]]) for ids, n in zip(batch["input_ids"], width.tolist(), strict=True)]


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def probe_averages(storage: Path) -> None:
    """Record gloo's result of ``ReduceOp.AVG`` over ranks that hold 1, 2, ...; rank 0 writes ``averages.pt``."""
    size, rank = dist.get_world_size(), dist.get_rank()
    target = storage / f"averages-{size}.pt"
    if target.exists():
        return
    outcomes: dict[str, Any] = {}
    for name, collective in {
        "all_reduce": lambda given, out: dist.all_reduce(out.copy_(given[: out.numel()]), op=dist.ReduceOp.AVG),
        "reduce_scatter_tensor": lambda given, out: dist.reduce_scatter_tensor(out, given, op=dist.ReduceOp.AVG),
        "reduce_scatter": lambda given, out: dist.reduce_scatter(out, list(given.chunk(size)), op=dist.ReduceOp.AVG),
    }.items():
        out = torch.zeros(3)
        try:
            collective(torch.full((3 * size,), rank + 1.0), out)
            outcomes[name] = out
        except (RuntimeError, ValueError) as error:
            outcomes[name] = str(error)
    dist.barrier()
    if rank == 0:
        torch.save(outcomes, target)


# ------------------------------------------------------------------------------------------------- deliberate faults


@contextmanager
def _same_data_on_each_rank() -> Iterator[None]:
    with mock.patch.object(Topology, "dp_rank", property(lambda self: 0)):
        yield


@contextmanager
def _sharded_over_a_larger_grid() -> Iterator[None]:
    """Deal examples out over twice as many ranks as read them, as if the world size were the group's size."""

    def steps(self: Any) -> Iterator[list[int]]:
        while True:
            mine = self.examples(self._step)[self._dp_rank :: 2 * self._dp_size].tolist()
            self._step += 1
            yield mine

    with mock.patch.object(StepSampler, "__iter__", steps):
        yield


@contextmanager
def _sampler_of_the_world() -> Iterator[None]:
    """Deal examples out over all ranks, even if they share their layers."""

    def steps(self: Any) -> Iterator[list[int]]:
        while True:
            mine = self.examples(self._step)[dist.get_rank() :: dist.get_world_size()].tolist()
            self._step += 1
            yield mine

    with mock.patch.object(StepSampler, "__iter__", steps):
        yield


@contextmanager
def _seed_of_each_rank() -> Iterator[None]:
    """Draw different dropout masks on ranks that share their layers."""
    seed = engines.seed_everything
    with mock.patch.object(engines, "seed_everything", lambda number: seed(number + 1000 * dist.get_rank())):
        yield


@contextmanager
def _all_reduce_skipped(function: str, direction: str) -> Iterator[None]:
    """Make one of AutoTP's two autograd functions pass on only this rank's part."""
    from deepspeed.module_inject import layers

    def passed_on(ctx: Any, *given: Any) -> Any:
        return given[1] if direction == "forward" else (None, *given, *[None] * (function == "RowParallel"))

    with mock.patch.object(getattr(layers, function), direction, staticmethod(passed_on)):
        yield


@contextmanager
def _losses_not_compared() -> Iterator[None]:
    with mock.patch.object(consistency, "SAME_LOSS", float("inf")):
        yield


@contextmanager
def _column_all_reduce_skipped() -> Iterator[None]:
    with _all_reduce_skipped("ColumnParallel", "backward"), _losses_not_compared():
        yield


@contextmanager
def _projection_left_whole() -> Iterator[None]:
    """Use a plan without one pair of projections, so that shapes still fit."""
    from tutorial_lib.engine.deepspeed import engine

    attention = [
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
    ]
    plan = {"use_default_specs": False, "layer_specs": attention}
    changed = _deepspeed_config(lambda built: built["tensor_parallel"].update(partition_config=plan))
    with changed, mock.patch.object(engine.ds_config, "add_plan", lambda settings, model_config: None):
        yield


@contextmanager
def _padding_in_the_loss() -> Iterator[None]:
    collate = Collate.__call__

    def labelled(self: Any, examples: Any) -> Any:
        batches = collate(self, examples)
        for batch in batches:
            batch["labels"] = batch["input_ids"].clone()
        return batches

    with mock.patch.object(Collate, "__call__", labelled):
        yield


@contextmanager
def _deepspeed_config(change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    build = ds_config.build

    def changed(config: Config) -> dict[str, Any]:
        built = build(config)
        change(built)
        return built

    with mock.patch.object(ds_config, "build", changed):
        yield


@contextmanager
def _averages_over(ranks: Callable[[int], int]) -> Iterator[None]:
    """Make the engine believe that it averages gradients over a different number of ranks."""
    build = trainer.build_engine

    def built(*args: Any) -> Any:
        engine = build(*args)
        engine.averages_over = ranks(engine.averages_over)
        return engine

    with mock.patch.object(trainer, "build_engine", built):
        yield


@contextmanager
def _loss_times(factor: Callable[[int, int, int], float]) -> Iterator[None]:
    """Scale the loss that goes into backward by a function of (this rank's tokens, all tokens, ranks)."""
    count, build = trainer.count_tokens, trainer.build_engine
    scale = [1.0]

    def counted(micro_batches: Any, topology: Topology, **given: Any) -> int:
        total = count(micro_batches, topology, **given)
        scale[0] = factor(_own_tokens(micro_batches), total, topology.dp)
        return total

    def built(*args: Any) -> Any:
        engine = build(*args)
        backward = engine.backward
        engine.backward = lambda loss: backward(loss * scale[0])
        return engine

    with mock.patch.object(trainer, "count_tokens", counted), mock.patch.object(trainer, "build_engine", built):
        yield


def _own_tokens(micro_batches: Sequence[dict[str, Tensor]]) -> int:
    return sum(count_targets(batch["labels"]) for batch in micro_batches)


@contextmanager
def _losses_of_own_tokens() -> Iterator[None]:
    """Report the mean over each rank's own tokens."""

    def own(micro_batches: Any, topology: Topology, **given: Any) -> int:
        return _own_tokens(micro_batches)

    def not_reduced(value: Tensor, topology: Topology, **given: Any) -> float:
        return float(value)

    with (
        mock.patch.object(trainer, "count_tokens", own),
        mock.patch.object(trainer, "sum_over_ranks", not_reduced),
    ):
        yield


@contextmanager
def _random_states_not_restored() -> Iterator[None]:
    with mock.patch.object(checkpoint.loader, "restore_random_states", lambda states, device: None):
        yield


@contextmanager
def _position_not_restored() -> Iterator[None]:
    with mock.patch.object(StepSampler, "load_state_dict", lambda self, state: None):
        yield


@contextmanager
def _optimizer_not_restored() -> Iterator[None]:
    """Restore weights but not moments, like a checkpoint with only weights."""
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    def load(self: Any, directory: Path) -> None:
        self.deepspeed.load_checkpoint(str(directory), tag="engine", load_optimizer_states=False)

    with mock.patch.object(DeepSpeedEngine, "load", load):
        yield


@contextmanager
def _fault_in_second_save(strike: Callable[[], None]) -> Iterator[None]:
    """Stop rank 1 in the second checkpoint, when its own files are written but the rest is not."""
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    save, saves = DeepSpeedEngine.save, []

    def failing(self: Any, directory: Path, *given: Any) -> None:
        save(self, directory, *given)
        saves.append(directory)
        if len(saves) == 2 and dist.get_rank() == 1:
            strike()

    with mock.patch.object(DeepSpeedEngine, "save", failing):
        yield


@contextmanager
def _killed_in_publish() -> Iterator[None]:
    """Kill rank 0 when its second checkpoint is complete, but still has its temporary name."""
    publish, published = checkpoint.saver.publish, []

    def publishing(partial: Path, final: Path) -> None:
        published.append(final)
        if len(published) == 2:
            _killed()
        publish(partial, final)

    with mock.patch.object(checkpoint.saver, "publish", publishing):
        yield


@contextmanager
def _killed_in_prune() -> Iterator[None]:
    """Kill rank 0 when an old checkpoint has lost its name and one of its files."""

    def discarding(doomed: Path) -> None:
        next(doomed.rglob("*.pt")).unlink()
        _killed()

    with mock.patch.object(checkpoint.directory, "_discard", discarding):
        yield


@contextmanager
def _fault_in_second_write(strike: Callable[[], None]) -> Iterator[None]:
    """Do the same while the files of the second checkpoint are written and training continues."""

    def second(step: int) -> None:
        if step == 4 and dist.get_rank() == 1:
            strike()

    with late_writes(second):
        yield


def _limit_files() -> None:
    """Limit files to 64 KiB from now on, as under a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))


def _kill_half_way() -> None:
    """End the process when half of its next write is in the file."""

    def half(self: Any, data: Any) -> None:
        data = memoryview(data).cast("B")
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        _killed()

    writer._HashedFile.write = half  # type: ignore[assignment,method-assign]


def _raise() -> None:
    raise OSError("the disk is full")


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


STRUCK_IN_STEP = 4
"""Step of the fault: two steps after the only checkpoint, so that one finished step is lost as well."""


@contextmanager
def _killed_in_pass(backward: bool) -> Iterator[None]:
    """Kill rank 1 in the middle of the model, in a forward pass or in a backward pass."""
    build, passes = trainer.build_engine, []

    def strike(*_: Any) -> None:
        _killed()

    def passing(layer: Any, given: Any, output: Any) -> None:
        passes.append(layer)
        if len(passes) == STRUCK_IN_STEP and dist.get_rank() == 1:
            if backward:
                (output if torch.is_tensor(output) else output[0]).register_hook(strike)
            else:
                strike()

    def built(*args: Any) -> Any:
        engine = build(*args)
        layers = next(module for module in engine.module.modules() if isinstance(module, torch.nn.ModuleList))
        layers[len(layers) // 2].register_forward_hook(passing)
        return engine

    with mock.patch.object(trainer, "build_engine", built):
        yield


@contextmanager
def _killed_in_update() -> Iterator[None]:
    """Kill rank 1 when AdamW has updated its shard, but no other rank has the new weights yet."""
    step, steps = torch.optim.AdamW.step, []

    def updating(self: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = step(self, *args, **kwargs)
        steps.append(self)
        if len(steps) == STRUCK_IN_STEP and dist.get_rank() == 1:
            _killed()
        return outcome

    with mock.patch.object(torch.optim.AdamW, "step", updating):
        yield


@contextmanager
def _killed_in_report() -> Iterator[None]:
    """Kill rank 0 when half of a metrics row is in its file."""
    append = RunDirectory.append

    def appending(self: RunDirectory, row: dict[str, Any]) -> None:
        if row["step"] < STRUCK_IN_STEP:
            return append(self, row)
        line = json.dumps(row)
        with self.metrics_file.open("a") as file:
            file.write(line[: len(line) // 2])
        _killed()

    with mock.patch.object(RunDirectory, "append", appending):
        yield


@contextmanager
def _read_only() -> Iterator[None]:
    """Make the directory of checkpoints read-only before the second save, once; see ``faults/small_storage.py``."""
    save, saves = checkpoint.manager.save, []

    def saving(run: RunDirectory, *args: Any) -> Any:
        saves.append(run)
        struck = run.path / "struck"
        if len(saves) == 2 and dist.get_rank() == 0 and not struck.exists():
            struck.write_text("")
            subprocess.run(["mount", "--bind", run.checkpoints, run.checkpoints], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", run.checkpoints], check=True)
        return save(run, *args)

    with mock.patch.object(checkpoint.manager, "save", saving):
        yield


@contextmanager
def _trial_step_kept() -> Iterator[None]:
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    with mock.patch.object(DeepSpeedEngine, "_undo_trial_step", lambda self: None):
        yield


@contextmanager
def _columns_not_moved() -> Iterator[None]:
    """Cut GPT-2's fused columns without reordering: the first rank gets all queries and half of the keys."""
    from tutorial_lib.engine.fsdp import weights

    with mock.patch.object(weights, "by_rank", lambda tensor, tp: tensor):
        yield


@contextmanager
def _whole_gradients_counted_twice() -> Iterator[None]:
    """Count replicated gradients in the norm once per tensor-parallel rank."""
    from tutorial_lib.engine.fsdp import sharding

    with mock.patch.object(sharding, "copies", lambda gradient, world_size: 1):
        yield


@contextmanager
def _slopes_of_the_first_heads() -> Iterator[None]:
    from tutorial_lib.engine.fsdp import tensor_parallel

    def unsliced(model: Any, mesh: Any) -> None:
        heads = model.config.n_head // mesh.size()
        for layer in tensor_parallel.layers_of(model):
            layer.self_attention.num_heads = heads
        inner, build = model.base_model, model.base_model.build_alibi_tensor
        inner.build_alibi_tensor = lambda mask, num_heads, dtype: build(mask, num_heads=heads, dtype=dtype)

    families = dict(tensor_parallel._FAMILIES, bloom=(tensor_parallel._bloom, unsliced))
    with mock.patch.object(tensor_parallel, "_FAMILIES", families):
        yield


@contextmanager
def _updates_not_counted() -> Iterator[None]:
    """Make Adam correct its moments as in its first update, after three updates."""
    with mock.patch.object(checkpoint.formats.deepspeed.Stage3, "adam_step", lambda self, name: 0):
        yield


@contextmanager
def _columns_left_by_rank() -> Iterator[None]:
    with mock.patch.object(checkpoint.formats.dcp, "by_part", lambda tensor, tp: tensor):
        yield


@contextmanager
def _moments_exchanged() -> Iterator[None]:
    moment = checkpoint.FullTensors.moment
    other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}

    def exchanged(self: Any, name: str, which: str) -> Tensor:
        return moment(self, name, other[which]).abs()  # no root of a negative number

    with mock.patch.object(checkpoint.FullTensors, "moment", exchanged):
        yield


BROKEN: dict[str, Callable[[], Any]] = {
    "same_data_on_each_rank": _same_data_on_each_rank,
    "sharded_over_a_larger_grid": _sharded_over_a_larger_grid,
    "padding_in_the_loss": _padding_in_the_loss,
    "clipping_dropped": lambda: _deepspeed_config(lambda built: built.update(gradient_clipping=0.0)),
    "clipping_left_to_the_default": lambda: _deepspeed_config(lambda built: built.pop("gradient_clipping")),
    "mean_of_means": lambda: _loss_times(lambda own, total, ranks: total / (own * ranks)),
    "loss_of_own_tokens": _losses_of_own_tokens,
    # A loss that is r times too large gives what a collective that sums instead of averaging gives, and the reverse.
    "gradients_summed": lambda: _averages_over(lambda ranks: ranks * ranks),
    "gradients_averaged_twice": lambda: _averages_over(lambda ranks: 1),
    "trial_step_kept": _trial_step_kept,
    "sampler_of_the_world": _sampler_of_the_world,
    "seed_of_each_rank": _seed_of_each_rank,
    "row_all_reduce_skipped": lambda: _all_reduce_skipped("RowParallel", "forward"),
    "column_all_reduce_skipped": _column_all_reduce_skipped,
    "projection_left_whole": _projection_left_whole,
    "columns_not_moved": _columns_not_moved,
    "whole_gradients_counted_twice": _whole_gradients_counted_twice,
    "slopes_of_the_first_heads": _slopes_of_the_first_heads,
    "random_states_not_restored": _random_states_not_restored,
    "position_not_restored": _position_not_restored,
    "optimizer_not_restored": _optimizer_not_restored,
    "updates_not_counted": _updates_not_counted,
    "columns_left_by_rank": _columns_left_by_rank,
    "moments_exchanged": _moments_exchanged,
    "save_raises": lambda: _fault_in_second_save(_raise),
    "killed_in_save": lambda: _fault_in_second_save(_killed),
    "killed_in_publish": _killed_in_publish,
    "killed_in_prune": _killed_in_prune,
    "limit_in_write": lambda: _fault_in_second_write(_limit_files),
    "killed_in_write": lambda: _fault_in_second_write(_kill_half_way),
    "killed_in_forward": lambda: _killed_in_pass(backward=False),
    "killed_in_backward": lambda: _killed_in_pass(backward=True),
    "killed_in_update": _killed_in_update,
    "killed_in_report": _killed_in_report,
    "read_only": _read_only,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
