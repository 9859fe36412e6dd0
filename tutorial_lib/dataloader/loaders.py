"""Data loaders: training and evaluation batches of one data-parallel rank, resumable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tutorial_lib.config import Config, ConfigError, DataConfig, ParallelConfig, RunConfig
from tutorial_lib.dataloader.collate import Batch, Collate
from tutorial_lib.dataloader.packing import Examples
from tutorial_lib.dataloader.rows import load_rows
from tutorial_lib.dataloader.sampler import EpochSampler, StepSampler
from tutorial_lib.dataloader.tokens import TokenSummary, document_maker, summary_of, tokenize_rows
from tutorial_lib.dataloader.train_eval_overlap import count_shared_places, count_shared_rows
from tutorial_lib.mpu import Topology

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_train_loader(config: Config, tokenizer: PreTrainedTokenizerBase, topology: Topology) -> TrainLoader:
    """Load the training split as optimizer steps, for one rank.

    Args:
        config: what to train on, and for how long.
        tokenizer: the model's tokenizer.
        topology: this rank's place in the grid: ranks that share a layer read the same examples.

    Raises:
        ConfigError: the data cannot be read, or does not fill one global batch.
    """
    return TrainLoader(*_training_steps(config, tokenizer, topology), config.run)


def build_epoch_loader(config: Config, tokenizer: PreTrainedTokenizerBase, topology: Topology) -> EpochLoader:
    """Load the training split as epochs of micro-batches, the same ones in the same order as :class:`TrainLoader`.

    Args:
        config: what to train on, and for how long.
        tokenizer: the model's tokenizer.
        topology: this rank's place in the grid.

    Raises:
        ConfigError: as for :func:`build_train_loader`.
    """
    return EpochLoader(*_training_steps(config, tokenizer, topology), config.run)


def _training_steps(
    config: Config, tokenizer: PreTrainedTokenizerBase, topology: Topology
) -> tuple[Examples, StepSampler, Collate]:
    _check_grid(config.parallel, topology)
    data, global_batch = config.data, config.run.global_batch
    examples = _examples(data, _load_documents(data, tokenizer, data.train_split, data.max_examples))
    if len(examples) < global_batch:
        unit = "packed rows" if data.batching == "packed" else "rows"
        raise ConfigError(
            f"Split {data.train_split!r} of {data.name!r} has {len(examples)} {unit}, fewer than "
            f"global_batch={global_batch}: not enough for one step. Write a smaller global_batch, or use more data."
        )
    sampler = StepSampler(
        len(examples),
        global_batch=global_batch,
        seed=config.run.seed,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp,
        lengths=examples.lengths if data.batching == "longest" else None,
    )
    return examples, sampler, _collate(data, config.micro_batch, tokenizer)


def build_eval_loader(config: Config, tokenizer: PreTrainedTokenizerBase, topology: Topology) -> EvalLoader:
    """Load the evaluation split as batches, for one rank.

    Args:
        config: what to evaluate on.
        tokenizer: the model's tokenizer.
        topology: this rank's place in the grid.

    Raises:
        ConfigError: the data cannot be read.
    """
    _check_grid(config.parallel, topology)
    data = config.data
    rows = load_rows(data.name, data.eval_split, max_examples=data.max_eval_examples)
    examples = _examples(data, _tokenize(data, tokenizer, data.eval_split, rows))
    shared = count_shared_places(data, rows)
    collate = _collate(data, config.micro_batch, tokenizer)
    return EvalLoader(examples, collate, topology.dp_rank, topology.dp, num_trained_on=shared)


class TrainLoader:
    """The optimizer steps of one data-parallel rank, epoch after epoch, resumable after any of them.

    An epoch has :attr:`steps_per_epoch` full steps; the examples that do not fill another step are left out, different
    ones in each epoch. torchdata's ``StatefulDataLoader`` keeps the position.

    Attributes:
        num_steps: total number of optimizer steps of the run.
        last_step: the step at which this launch stops: the run's last one, or ``stop_after``.
        summary: summary of the training split's tokens.
    """

    def __init__(self, examples: Examples, sampler: StepSampler, collate: Collate, run: RunConfig) -> None:
        self.steps_per_epoch = sampler.steps_per_epoch
        self.num_steps, self.last_step = _run_length(run, self.steps_per_epoch)
        self.summary: TokenSummary = examples.summary
        self._sampler = sampler
        self._step = 0
        self._iterator: Iterator[list[Batch]] | None = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
            self._loader = StatefulDataLoader(
                examples,
                batch_sampler=sampler,
                collate_fn=collate,
                # Each iterator draws a seed from this generator. If it drew from the global one, dropout would depend
                # on how often a run resumed.
                generator=torch.Generator(),
            )

    def steps(self, start: int | None = None) -> Iterator[tuple[int, list[Batch]]]:
        """Yield each optimizer step until :attr:`last_step`: its number, from 1, and this rank's micro-batches.

        Args:
            start: number of steps already done, from ``CheckpointManager.restore``; default: the number that this
                loader has yielded.
        """
        if start is not None and start != self._step:
            self._sampler.load_state_dict(self._sampler.state_dict() | {"step": start})
            self._step, self._iterator = start, None
        while self._step < self.last_step:
            if self._iterator is None:
                self._iterator = iter(self._loader)
            micro_batches = next(self._iterator)
            self._step += 1
            yield self._step, micro_batches

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the position after a step, for a checkpoint. It must be the step that was yielded last."""
        if step != self._step:
            raise ValueError(f"This loader is at step {self._step}, so it cannot give the position after step {step}.")
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the step that was yielded last; it is valid for any number of ranks."""
        return {"step": self._step, "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make :meth:`steps` continue from a saved position.

        Raises:
            ConfigError: the position belongs to different data, or to a different seed or global batch.
        """
        self._loader.load_state_dict(state["loader"])
        self._iterator = iter(self._loader)
        self._step = state["step"]


class EpochLoader(DataLoader[Any]):
    """One epoch of micro-batches of one data-parallel rank: a ``DataLoader`` for the Hugging Face Trainer.

    It keeps no position: ``set_epoch`` chooses the epoch, and to resume within one, the caller skips the micro-batches
    that it has already trained on.
    """

    def __init__(self, examples: Examples, sampler: StepSampler, collate: Collate, run: RunConfig) -> None:
        self.steps_per_epoch = sampler.steps_per_epoch
        self.num_steps, self.last_step = _run_length(run, self.steps_per_epoch)
        self.summary: TokenSummary = examples.summary
        self._steps, self._epochs = sampler, EpochSampler(sampler, collate.micro_batch)

        def collate_one(members: Any) -> Batch:
            (batch,) = collate(members)
            return batch

        # Each iterator draws a seed from this generator. TrainLoader explains why it is not the global one.
        super().__init__(examples, batch_sampler=self._epochs, collate_fn=collate_one, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch for the next iteration, counted from 0."""
        self._epochs.set_epoch(epoch)

    def state_at(self, step: int) -> dict[str, int]:
        """Return the position after a step, for a checkpoint."""
        return self._steps.state_dict() | {"step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that a saved position belongs to this order of examples.

        Raises:
            ConfigError: it belongs to different data, or to a different seed or global batch.
        """
        self._steps.load_state_dict(state)


class EvalLoader:
    """Evaluation batches of one data-parallel rank; over all ranks, every example is in exactly one batch.

    Every rank yields the same number of batches, because ranks that share parameters (ZeRO stage 3) must compute in
    lockstep. A rank with fewer batches gets an extra one with all labels set to -100, which adds nothing to the loss.

    Attributes:
        summary: summary of the evaluation split's tokens.
        num_examples: number of examples over all ranks.
        num_trained_on: rows that are in the training split as well.
    """

    def __init__(
        self, examples: Examples, collate: Collate, dp_rank: int, dp_size: int, *, num_trained_on: int = 0
    ) -> None:
        self.num_trained_on = num_trained_on
        self.summary: TokenSummary = examples.summary
        self.num_examples = len(examples)
        by_length = (-examples.lengths).argsort(kind="stable").tolist()
        size = collate.micro_batch
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        mine = batches[dp_rank::dp_size]
        self._num_real = len(mine)
        self._num_dummy = -(-len(batches) // dp_size) - len(mine)
        self._loader = DataLoader(
            examples,
            batch_sampler=mine + batches[:1] * self._num_dummy,
            collate_fn=collate,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._num_real + self._num_dummy

    def __iter__(self) -> Iterator[Batch]:
        for number, (batch,) in enumerate(self._loader):
            if number >= self._num_real:
                batch["labels"].fill_(-100)
            yield batch


def check_data(data: DataConfig, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Refuse data that cannot be read, and splits whose columns cannot be tokenised.

    Returns:
        A warning if some rows would be both trained and evaluated on, or None.

    Raises:
        ConfigError: says what is wrong and what to write instead.
    """
    loaded = {}
    for use, (split, max_examples) in _splits(data, run).items():
        loaded[use] = load_rows(data.name, split, max_examples=max_examples)
        document_maker(loaded[use], tokenizer, data.seq_length, f"split {split!r} of {data.name!r}")
    shared = count_shared_rows(data, loaded["train"], loaded["eval"]) if "eval" in loaded else 0
    if not shared:
        return None
    return (
        f"{shared} of the {len(loaded['eval'])} rows of eval_split={data.eval_split!r} are also trained on, in "
        f"train_split={data.train_split!r}: the evaluation loss does not tell how well the model does on new text. "
        "Write splits without common rows, such as train_split='train[5%:]' and eval_split='train[:5%]', or "
        "evaluate=False (--no-evaluate)."
    )


def data_identity(data: DataConfig, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the SHA-256 of the tokens that a run trains and evaluates on: ``{"train": sha256, "eval": sha256}``.

    A split that is already tokenised is not tokenised again: its hash is saved next to its tokens.

    Raises:
        ConfigError: the data cannot be read.
    """
    splits = _splits(data, run)
    return {use: summary_of(_load_documents(data, tokenizer, *split)).sha256 for use, split in splits.items()}


def _splits(data: DataConfig, run: RunConfig) -> dict[str, tuple[str, int | None]]:
    """Return the splits that a run reads, by purpose: the name of each, and the maximum number of its rows to read."""
    splits = {"train": (data.train_split, data.max_examples)}
    if run.evaluate:
        splits["eval"] = (data.eval_split, data.max_eval_examples)
    return splits


def _load_documents(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str, max_examples: int | None
) -> datasets.Dataset:
    return _tokenize(data, tokenizer, split, load_rows(data.name, split, max_examples=max_examples))


def _tokenize(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str, rows: datasets.Dataset
) -> datasets.Dataset:
    return tokenize_rows(rows, tokenizer, data.seq_length, name=f"split {split!r} of {data.name!r}")


def _examples(data: DataConfig, documents: datasets.Dataset) -> Examples:
    return Examples(documents, pack_to=data.seq_length if data.batching == "packed" else None)


def _collate(data: DataConfig, micro_batch: int, tokenizer: PreTrainedTokenizerBase) -> Collate:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Collate(
        seq_length=data.seq_length,
        batching=data.batching,
        micro_batch=micro_batch,
        pad_token_id=pad,
    )


def _run_length(run: RunConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Return the number of optimizer steps of a run, and the step at which this launch stops."""
    num_steps = run.steps or run.epochs * steps_per_epoch
    return num_steps, min(num_steps, run.stop_after or num_steps)


def _check_grid(parallel: ParallelConfig, topology: Topology) -> None:
    if topology.dp != parallel.dp:
        raise ConfigError(
            f"The data-parallel group has {topology.dp} ranks, but dp={parallel.dp}. Write dp={topology.dp}."
        )
