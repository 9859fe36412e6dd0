"""Sections of a configuration: every setting with its default, its help text and its own rules.

A field's metadata is the single source for the engines that read the setting, its choices and range, and whether a
resumed run may change it. The lists that other modules use are derived from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot run. The message says what is wrong, where, and what to write instead."""


Resume = Literal["fixed", "free", "one start"]
"""Rule for changing a setting on resume: ``fixed`` forbids it, and ``free`` allows it.

``one start`` allows it as well, because the setting describes a single start of the run.

Changing a free setting does not change the next update, except for rounding (the order in which numbers are added) and,
if the number of ranks changes, dropout's random numbers."""

ENGINES = ("deepspeed", "fsdp", "torch", "trainer")

_OWN_LOOP = ("deepspeed", "fsdp", "torch")
"""Engines that run in the package's own training loop, rather than in the Hugging Face Trainer's."""


def _setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: tuple[Any, ...] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    engines: tuple[str, ...] = ENGINES,
    resume: Resume = "fixed",
    shape_of: tuple[str, ...] = (),
    is_path: bool = False,
    none_word: str | None = None,
) -> Any:
    """Declare one setting.

    Args:
        default: its value in the cpu profile.
        help: one line for the command line.
        flag: the flat name, if it differs from the field's name.
        choices: all possible values.
        at_least: the smallest possible value.
        at_most: the largest possible value.
        below: exclusive upper limit.
        engines: the engines that read it.
        resume: whether a resumed run may change it; see :data:`Resume`.
        shape_of: the engines for which it is part of a checkpoint's shape, because it decides which rank holds which
            part of a run's state, or in which format.
        is_path: whether the value may be the path of a file or directory.
        none_word: word for None on the command line, if None may be given there.
    """
    metadata = {
        "flag": flag, "help": help, "choices": choices, "at_least": at_least, "at_most": at_most, "below": below,
        "engines": engines, "resume": resume, "shape_of": shape_of, "is_path": is_path,
        "none_word": none_word,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The causal language model to train."""

    name: str = _setting(
        "embedded/gpt2",
        "hub name, a directory, embedded/gpt2, embedded/qwen2, embedded/bloom, or published/NAME (see --model-config)",
        flag="model",
        is_path=True,
    )
    random_init: bool = _setting(False, "build the model from its configuration with seeded random weights")
    freeze: tuple[str, ...] = _setting((), "parameters not to train, as name patterns (* and ? match)")
    trust_remote_code: bool = _setting(False, "run Python code that a hub model ships with", resume="free")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The rows to read, and how they become batches."""

    name: str = _setting(
        "embedded/news",
        "hub name, a directory, a file, or embedded/news, embedded/articles, embedded/qa",
        flag="dataset",
        is_path=True,
    )
    seq_length: int = _setting(128, "longest sequence in tokens; longer rows are truncated", at_least=2)
    batching: str = _setting(
        "longest",
        "max_length: pad to seq_length; longest: group by length, pad to the longest; packed: fill each row",
        choices=("max_length", "longest", "packed"),
    )
    train_split: str = _setting("train", "split to train on")
    eval_split: str = _setting("validation", "split to evaluate on")
    max_examples: int | None = _setting(
        None,
        "use only the first N rows of the training split, or all (default: all; 500, as in the ZeRO workshop, with "
        "engine trainer on data like SQuAD)",
        at_least=1,
        none_word="all",
    )
    max_eval_examples: int | None = _setting(
        64,
        "use only the first N rows of the evaluation split, or all (default: 64; 50, as in the ZeRO workshop, with "
        "engine trainer on data like SQuAD)",
        at_least=1,
        none_word="all",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The shape of the rank grid: world size = dp x tp."""

    dp: int = _setting(
        2, "data-parallel size: how many ranks read different data", at_least=1, resume="free", shape_of=ENGINES
    )
    tp: int = _setting(
        1, "tensor-parallel size: how many ranks share each layer", at_least=1, resume="free", shape_of=ENGINES
    )

    @property
    def world_size(self) -> int:
        return self.dp * self.tp


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The engine that turns a loss into an update, and where model states live."""

    name: str = _setting(
        "deepspeed",
        "deepspeed: ZeRO; fsdp: PyTorch's FSDP2, DDP and DTensor; torch: one plain process, the reference; "
        "trainer: the Hugging Face Trainer, plain, with a DeepSpeed file, or with shard_at_load",
        flag="engine",
        choices=ENGINES,
        resume="free",
        shape_of=ENGINES,
    )
    zero_stage: int = _setting(
        3,
        "0: nothing partitioned; 1: optimizer states; 2: + gradients; 3: + parameters (deepspeed only)",
        at_least=0,
        at_most=3,
        engines=("deepspeed",),
        resume="free",
        shape_of=("deepspeed", "trainer"),
    )
    sharding: str = _setting(
        "full_shard",
        "fsdp: full_shard, shard_grad_op (parameters stay gathered until backward ends), hybrid_shard (sharded over "
        "shard_size ranks, replicated over the others) or no_shard (DDP)",
        engines=("fsdp",),
        resume="free",
        shape_of=("fsdp",),
    )
    shard_size: int | None = _setting(
        None,
        "fsdp, hybrid_shard: how many data-parallel ranks share one copy",
        at_least=1,
        engines=("fsdp",),
        resume="free",
        shape_of=("fsdp",),
    )
    wrap: str = _setting(
        "layer",
        "fsdp: gather one layer at a time (layer), or the full model at once (root)",
        choices=("layer", "root"),
        engines=("fsdp",),
        resume="free",
    )
    tp_plan: str = _setting(
        "megatron",
        "fsdp with tp: all-reduce once per attention or MLP block, forward and backward (megatron), or once per matrix "
        "product (plain)",
        choices=("megatron", "plain"),
        engines=("fsdp",),
        resume="free",
    )
    reduce_each: bool = _setting(
        False,
        "fsdp: reduce gradients with every micro-batch, as plain FSDP2 does, instead of once per step: less memory, "
        "more traffic",
        engines=("fsdp",),
        resume="free",
    )
    offload: str = _setting(
        "none",
        "keep in host memory: optimizer (ZeRO 1-3), or all: optimizer and parameters (ZeRO 3, fsdp)",
        choices=("none", "optimizer", "all"),
        engines=("deepspeed", "fsdp"),
        resume="free",
        shape_of=("fsdp", "deepspeed", "trainer"),
    )
    pin_memory: bool = _setting(
        False,
        "page-lock offloaded memory",
        engines=("deepspeed", "fsdp"),
        resume="free",
    )
    precision: str = _setting("fp32", "number format of forward and backward", choices=("fp32", "bf16", "fp16"))
    persistence_threshold: int = _setting(
        0,
        "stage 3 keeps parameters of up to this many elements in full on every rank (plain DeepSpeed: 100000)",
        at_least=0,
        engines=("deepspeed",),
        resume="free",
    )
    bucket_size: int = _setting(
        1_000_000,
        "elements that ZeRO reduces or gathers at once; stage 3 allocates a buffer for them (plain DeepSpeed: 5e8)",
        at_least=1,
        engines=("deepspeed",),
        resume="free",
    )
    activation_checkpointing: bool = _setting(
        False, "recompute activations in backward instead of keeping them", resume="free"
    )
    recompute: str = _setting(
        "full",
        "with activation_checkpointing: recompute everything in a layer (full), or keep attention's output and every "
        "second matrix product (selective)",
        choices=("full", "selective"),
        engines=_OWN_LOOP,
        resume="free",
    )
    loss_chunks: int = _setting(
        1,
        "compute output layer and loss in this many chunks, so that a micro-batch's logits never exist all at once",
        at_least=1,
        engines=_OWN_LOOP,
        resume="free",
    )
    """With a large vocabulary, the logits and their gradient are the largest tensors of a step: B x S x V in fp32.

    In fp32, chunks change loss and gradients only by rounding; in 16 bits the reported loss is rounded per token."""
    deepspeed_file: str | None = _setting(
        None,
        "a DeepSpeed JSON file, by path or by its name in tutorial_lib/ds_configs",
        flag="deepspeed",
        engines=("deepspeed", "trainer"),
        resume="free",
        shape_of=("deepspeed", "trainer"),
        is_path=True,
    )
    shard_at_load: bool = _setting(
        False,
        "trainer: split the model over the dp ranks while it loads (transformers' DistributedConfig, FSDP2); saves "
        "weights alone, at the end",
        engines=("trainer",),
        resume="free",
    )

    def __post_init__(self) -> None:
        # FSDP1, and most articles about it, spell these in upper case.
        if isinstance(self.sharding, str):
            object.__setattr__(self, "sharding", self.sharding.lower())


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = _setting(1e-3, "peak learning rate", at_least=0.0)
    beta1: float = _setting(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = _setting(0.999, "decay of the second moment", at_least=0, below=1)
    eps: float = _setting(1e-8, "added to the denominator of the update", at_least=1e-30)  # 0 / 0 is NaN
    weight_decay: float = _setting(0.01, "decoupled weight decay, applied to every trained parameter", at_least=0.0)
    gradient_clipping: float = _setting(1.0, "largest global gradient norm; 0 turns clipping off", at_least=0.0)
    schedule: str = _setting(
        "linear",
        "learning-rate schedule after the warm-up",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = _setting(0, "optimizer steps over which the learning rate rises from 0", at_least=0)

    @property
    def scheduler_name(self) -> str:
        """The schedule's name in transformers, whose plain ``constant`` has no warm-up."""
        return "constant_with_warmup" if self.schedule == "constant" else self.schedule

    @property
    def adamw(self) -> dict[str, Any]:
        """The arguments of PyTorch's AdamW, and of DeepSpeed's."""
        betas = (self.beta1, self.beta2)
        return {"lr": self.learning_rate, "betas": betas, "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run itself: its name, length, batch sizes, seed, launcher and checkpoints."""

    name: str = _setting("run", "name of the run: its directory under storage, where a resume finds it", resume="free")
    storage: str = _setting("runs", "directory that every rank can write to", resume="free", is_path=True)
    launcher: str = _setting(
        "local",
        "local: start processes here; ray: Ray Train; none: run as the rank given by torchrun's environment variables",
        choices=("local", "ray", "none"),
        resume="free",
    )
    device: str = _setting("cpu", "cpu or cuda", choices=("cpu", "cuda"), resume="free", shape_of=ENGINES)
    epochs: int = _setting(1, "passes over the training split, when steps is not given", at_least=1)
    steps: int | None = _setting(None, "optimizer steps in total; overrides epochs", at_least=1)
    stop_after: int | None = _setting(
        None, "save and stop after this optimizer step, as a time limit would", at_least=1, resume="one start"
    )
    seed: int = _setting(
        0,
        "seed for the data order, dropout and random weights",
        at_least=0,
        at_most=2**32 - 1,  # the largest that every random-number generator accepts
    )
    global_batch: int = _setting(8, "sequences per optimizer step, over all ranks and micro-batches", at_least=1)
    micro_batch: int | None = _setting(
        None, "sequences per forward pass and rank; default: global_batch / dp", at_least=1, resume="free"
    )
    checkpoint_every: int = _setting(0, "save every N optimizer steps; 0: only at the end", at_least=0, resume="free")
    keep_last: int | None = _setting(
        None,
        "keep only the newest N intact checkpoints; default: keep all",
        at_least=1,
        resume="free",
    )
    keep_best: bool = _setting(
        False, "evaluate at every checkpoint, and never delete the one with the lowest evaluation loss", resume="free"
    )
    max_failures: int = _setting(
        0, "launcher='ray': restart the workers after up to this many failures", at_least=0, resume="free"
    )
    min_dp: int | None = _setting(
        None,
        "launcher='ray': when nodes are lost, continue with at least this many data-parallel ranks, and grow back to "
        "dp; default: dp",
        at_least=1,
        resume="free",
    )
    resource_timeout: int = _setting(
        300,
        "launcher='ray': seconds to wait for free resources in the cluster; then give up, and name what is missing",
        at_least=1,
        resume="free",
    )
    async_save: bool = _setting(
        False,
        "write files while training continues, from a second copy of the rank's states in host memory",
        engines=_OWN_LOOP,
        resume="free",
    )
    resume: str = _setting(
        "auto",
        "auto: continue the run of this name if it has a checkpoint; never: refuse to touch an existing run",
        choices=("auto", "never"),
        resume="one start",
    )
    evaluate: bool = _setting(True, "evaluate before the first and after the last step", resume="one start")
    evaluate_every: str | None = _setting(
        None,
        "also evaluate every N optimizer steps, or after every epoch (epoch); see eval_losses in result.json",
        resume="free",
    )
    score_answers: bool = _setting(
        False,
        "trainer, on data like SQuAD: with each evaluation, also answer its questions greedily, and report exact match "
        "and F1",
        engines=("trainer",),
        resume="free",
    )
    memory_log_seconds: float | None = _setting(
        None,
        "log each rank's memory and that of the GPUs every N seconds: logs/memory-rank-NNN.jsonl, new with each start "
        "(default: no log)",
        at_least=0.01,
        at_most=86400,
        resume="free",
    )
    measure: bool = _setting(
        False, "measure model states, activations, peak and traffic of one step; slows it", resume="one start"
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the tree, as the command line shows it."""

    flag: str
    section: str
    field: str
    type: Any
    default: Any
    help: str
    choices: tuple[Any, ...] | None
    at_least: float | None
    at_most: float | None
    below: float | None
    engines: tuple[str, ...]
    resume: Resume
    shape_of: tuple[str, ...]
    is_path: bool
    none_word: str | None
