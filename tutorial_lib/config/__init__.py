"""What to run: one frozen tree of dataclasses, three profiles, and validation.

A run is described by a :class:`Config` and by nothing else. Profiles (``cpu``, ``gpu``, ``cluster``) differ in
*values* only; the code that reads them is the same everywhere. Every field has a *flat* name (the command line's
flag without dashes), so that ``Config.create("cpu", zero_stage=2, dataset="embedded/qa")``, a notebook's parameters
and ``python -m tutorial_lib train --zero-stage 2 --dataset embedded/qa`` say the same thing.

This module imports nothing but the standard library: arithmetic, launchers and schedulers can read a configuration
without starting torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

PROFILES = ("cpu", "gpu", "cluster")


class ConfigError(ValueError):
    """A configuration that cannot run. The message says what is wrong, where, and what to write instead."""


def _setting(default: Any, help: str, *, flag: str | None = None, choices: tuple[Any, ...] | None = None) -> Any:
    return field(default=default, metadata={"flag": flag, "help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which causal language model is trained."""

    name: str = _setting(
        "embedded/gpt2", "hub name, a directory, or embedded/gpt2, embedded/qwen2, embedded/bloom", flag="model"
    )
    random_init: bool = _setting(False, "build the model from its configuration with seeded random weights")
    freeze: tuple[str, ...] = _setting((), "parameters not to train, as name patterns (* and ? match)")
    trust_remote_code: bool = _setting(False, "run Python code that a hub model ships with")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which rows are read, and how they become batches."""

    name: str = _setting(
        "embedded/news",
        "hub name, a directory, or embedded/news, embedded/articles, embedded/qa",
        flag="dataset",
    )
    seq_length: int = _setting(128, "longest sequence in tokens; longer rows are truncated")
    batching: str = _setting(
        "longest",
        "max_length: pad to seq_length; longest: group by length, pad to the longest; packed: fill each row",
        choices=("max_length", "longest", "packed"),
    )
    train_split: str = _setting("train", "split to train on")
    eval_split: str = _setting("validation", "split to evaluate on")
    max_examples: int | None = _setting(None, "use only the first this many rows of the training split")
    max_eval_examples: int | None = _setting(64, "use only the first this many rows of the evaluation split")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The shape of the rank grid: world size = dp x tp."""

    dp: int = _setting(2, "data-parallel size: how many ranks read different data")
    tp: int = _setting(1, "tensor-parallel size: how many ranks share each layer")

    @property
    def world_size(self) -> int:
        return self.dp * self.tp


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Who turns a loss into an update, and where model states live."""

    name: str = _setting(
        "deepspeed",
        "deepspeed: ZeRO; fsdp: PyTorch's FSDP2, DDP and DTensor; torch: one plain process, the reference",
        flag="engine",
        choices=("deepspeed", "fsdp", "torch"),
    )
    zero_stage: int = _setting(
        3, "0: nothing partitioned; 1: optimizer states; 2: + gradients; 3: + parameters (deepspeed alone reads it)"
    )
    sharding: str = _setting(
        "full_shard",
        "fsdp: full_shard, shard_grad_op (parameters stay gathered until backward ends), hybrid_shard (sharded over "
        "shard_size ranks, copied over the others) or no_shard (DDP)",
    )
    shard_size: int | None = _setting(None, "fsdp, hybrid_shard: how many data-parallel ranks share one copy")
    wrap: str = _setting(
        "layer", "fsdp: what is gathered at once: one layer, or the whole model (root)", choices=("layer", "root")
    )
    tp_plan: str = _setting(
        "megatron",
        "fsdp with tp: megatron: one all-reduce per attention and MLP and direction; plain: one per product",
        choices=("megatron", "plain"),
    )
    offload: str = _setting(
        "none",
        "keep in host memory: optimizer (ZeRO 1-3), or all: optimizer and parameters (ZeRO 3, fsdp)",
        choices=("none", "optimizer", "all"),
    )
    pin_memory: bool = _setting(False, "page-lock offloaded memory; always stated, DeepSpeed's default has changed")
    precision: str = _setting("fp32", "arithmetic of forward and backward", choices=("fp32", "bf16", "fp16"))
    persistence_threshold: int = _setting(
        0, "stage 3 keeps parameters below this many elements whole on every rank (DeepSpeed's default: 100000)"
    )
    bucket_size: int = _setting(
        1_000_000, "elements that ZeRO reduces or gathers at once; stage 3 allocates them (DeepSpeed's default: 5e8)"
    )
    activation_checkpointing: bool = _setting(False, "recompute activations in backward instead of keeping them")
    deepspeed_file: str | None = _setting(
        None, "a DeepSpeed JSON file, by path or by its name in tutorial_lib/ds_configs", flag="deepspeed"
    )

    def __post_init__(self) -> None:
        # FSDP1 wrote them in upper case, and so does what has been written about it.
        if isinstance(self.sharding, str):
            object.__setattr__(self, "sharding", self.sharding.lower())


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = _setting(1e-3, "peak learning rate")
    beta1: float = _setting(0.9, "decay of the first moment")
    beta2: float = _setting(0.999, "decay of the second moment")
    eps: float = _setting(1e-8, "added to the denominator")
    weight_decay: float = _setting(0.01, "decoupled weight decay, applied to every trained parameter")
    gradient_clipping: float = _setting(1.0, "largest global gradient norm; 0 turns clipping off")
    schedule: str = _setting(
        "linear",
        "learning-rate schedule after the warm-up",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = _setting(0, "optimizer steps over which the learning rate rises from 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long, from which seed, under which name, started by whom."""

    name: str = _setting("run", "name of the run: its directory under storage, and what a resume finds again")
    storage: str = _setting("runs", "directory that every rank can write to")
    launcher: str = _setting(
        "local",
        "local: start processes here; ray: Ray Train; none: be the rank that torchrun's variables name",
        choices=("local", "ray", "none"),
    )
    device: str = _setting("cpu", "cpu or cuda", choices=("cpu", "cuda"))
    epochs: int = _setting(1, "passes over the training split, when steps is not given")
    steps: int | None = _setting(None, "optimizer steps in all; overrides epochs")
    stop_after: int | None = _setting(None, "save and stop after this optimizer step, as a time limit would")
    seed: int = _setting(0, "seed of the data order, of dropout, and of random weights")
    global_batch: int = _setting(8, "sequences per optimizer step, over all ranks and micro-batches")
    micro_batch: int | None = _setting(None, "sequences per forward pass and rank; default: global_batch / dp")
    checkpoint_every: int = _setting(0, "save every this many optimizer steps; 0: only at the end")
    keep_last: int | None = _setting(
        None, "keep the newest this many whole checkpoints and delete older ones; default: keep all"
    )
    keep_best: bool = _setting(
        False, "evaluate at every checkpoint, and never delete the one with the lowest evaluation loss"
    )
    max_failures: int = _setting(0, "launcher='ray': start the workers again after up to this many failures")
    async_save: bool = _setting(
        False, "write files while training goes on, from a copy in host memory (another one of the rank's states)"
    )
    resume: str = _setting(
        "auto",
        "auto: continue the run of this name if it has a checkpoint; never: refuse to touch an existing run",
        choices=("auto", "never"),
    )
    evaluate: bool = _setting(True, "evaluate before the first and after the last step")
    measure: bool = _setting(False, "account memory and count traffic of one step; slows that step")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run depends on. Build it with :meth:`create`, vary it with :meth:`override`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        _validate(self)

    @classmethod
    def create(cls, profile: str = "cpu", **flat: Any) -> Config:
        """A profile's configuration with some settings replaced, named as on the command line.

        Raises:
            ConfigError: unknown profile or setting, or a combination that cannot run.
        """
        if profile not in PROFILES:
            raise ConfigError(f"profile {profile!r} is not known. Write one of: {', '.join(PROFILES)}.")
        return _build({**_PROFILE_VALUES[profile], **flat}, base=None)

    def override(self, **flat: Any) -> Config:
        """A copy with some settings replaced, named as on the command line."""
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
        """Where the run's records and checkpoints are: ``storage/name``."""
        return Path(self.run.storage).expanduser() / self.run.name

    def with_absolute_paths(self) -> Config:
        """The same run for a process that may start in another directory, as Ray's workers do."""
        names = {"storage": self.run.storage, "model": self.model.name, "dataset": self.data.name}
        if self.engine.deepspeed_file:
            names["deepspeed"] = self.engine.deepspeed_file
        paths = {flag: Path(name).expanduser() for flag, name in names.items()}
        # A plain file that happens to be called gpt2 does not make the hub's gpt2 a path.
        is_path = {"storage": lambda p: True, "deepspeed": Path.is_file, "model": Path.is_dir, "dataset": Path.is_dir}
        return self.override(**{flag: str(p.resolve()) for flag, p in paths.items() if is_path[flag](p)})

    def flat(self) -> dict[str, Any]:
        """The settings by their flat names."""
        return {s.flag: getattr(getattr(self, s.section), s.field) for s in settings().values()}

    def to_json(self) -> str:
        return json.dumps(self.flat(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: the text is no JSON object, or holds what :meth:`create` refuses.
        """
        try:
            flat = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"The configuration is not valid JSON: {error}.") from error
        if not isinstance(flat, dict):
            raise ConfigError(f"The configuration is a JSON {type(flat).__name__}, not an object.")
        return _build({k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}, base=None)

    def fingerprint(self) -> str:
        """Identifies what a checkpoint depends on; runs that differ here cannot continue each other exactly."""
        fixed = {k: v for k, v in self.flat().items() if k not in FREE_ON_RESUME}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


FREE_ON_RESUME = frozenset(
    {"name", "storage", "launcher", "stop_after", "checkpoint_every", "async_save", "resume", "evaluate", "measure"}
    | {"keep_last", "keep_best", "max_failures"}
    | {"pin_memory", "bucket_size", "wrap", "activation_checkpointing", "trust_remote_code", "micro_batch", "tp_plan"}
    | {"engine", "device", "dp", "tp", "zero_stage", "sharding", "shard_size", "offload", "deepspeed"}
    | {"persistence_threshold"}
)
"""Flat names that a resumed run may change without changing which update comes next: it is the same but for the order
in which numbers are added, and for dropout's random numbers where the ranks are others."""

OF_ONE_START = frozenset({"stop_after", "resume", "evaluate", "measure"})
"""Flat names of what one start of a run does. A reshape, which trains no step, decides them itself."""

_PROFILE_VALUES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {
        "device": "cuda",
        "precision": "bf16",
        "dp": 1,
        "seq_length": 512,
        "pin_memory": True,
        "bucket_size": 500_000_000,
    },
    "cluster": {
        "device": "cuda",
        "precision": "bf16",
        "dp": 8,
        "seq_length": 512,
        "global_batch": 64,
        "pin_memory": True,
        "bucket_size": 500_000_000,
        "launcher": "none",
        "persistence_threshold": 100_000,
        "checkpoint_every": 100,
    },
}


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


def settings() -> dict[str, Setting]:
    """All settings by flat name, in the order in which they are declared."""
    found: dict[str, Setting] = {}
    for section in dataclasses.fields(Config):
        section_type: Any = type(section.default)
        hints = get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            flag = item.metadata["flag"] or item.name
            found[flag] = Setting(
                flag, section.name, item.name, hints[item.name], item.default, item.metadata["help"],
                item.metadata["choices"],
            )  # fmt: skip
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


def _validate(config: Config) -> None:
    """Refuse what cannot run, before any process starts."""
    flat = config.flat()
    for setting in settings().values():
        _check_type(setting, flat[setting.flag])
    engine, parallel, run = config.engine, config.parallel, config.run

    for flag, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} is {value}; write a finite number.")
    for flag in ("beta1", "beta2"):
        if not 0 <= flat[flag] < 1:
            raise ConfigError(f"{flag} is {flat[flag]}; write a number from 0 up to, but not including, 1.")
    for flag, lowest in _LOWEST.items():
        if flat[flag] is not None and flat[flag] < lowest:
            raise ConfigError(f"{flag} is {flat[flag]}; the smallest possible value is {lowest}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name):
        raise ConfigError(
            f"Run name {run.name!r} cannot be a directory name. Use letters, digits, '.', '_' and '-' alone, "
            "starting with a letter or digit; directories go into storage."
        )
    if engine.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_stage is {engine.zero_stage}; ZeRO has the stages 0, 1, 2 and 3.")
    if engine.name == "deepspeed" and engine.offload == "all" and engine.zero_stage != 3:
        raise ConfigError(
            f"offload='all' moves parameters to host memory, which needs zero_stage=3, not {engine.zero_stage}. "
            "Write offload='optimizer', or zero_stage=3."
        )
    if engine.name == "deepspeed" and engine.offload == "optimizer" and engine.zero_stage == 0:
        raise ConfigError(
            "offload='optimizer' needs optimizer states that ZeRO partitions: write zero_stage=1, 2 or 3, "
            "or offload='none'."
        )
    if engine.precision == "fp16" and run.device == "cpu":
        raise ConfigError("precision='fp16' needs a GPU: on a CPU write precision='bf16' or 'fp32'.")
    if engine.name == "torch":
        if parallel.world_size != 1:
            raise ConfigError(
                f"engine='torch' is the one-process reference, but dp x tp = {parallel.world_size}. "
                "Write dp=1, tp=1, or engine='deepspeed' or 'fsdp'."
            )
        if engine.offload != "none" or engine.deepspeed_file or engine.precision == "fp16":
            raise ConfigError(
                "engine='torch' has no offload, no fp16 and reads no DeepSpeed file; write engine='deepspeed'."
            )
    _check_fsdp(engine, parallel)
    _check_batch_sizes(config)
    if run.stop_after is not None and run.steps is not None and run.stop_after > run.steps:
        raise ConfigError(f"stop_after={run.stop_after} lies beyond the last step, steps={run.steps}.")
    if run.keep_best and not run.evaluate:
        raise ConfigError("keep_best=True compares evaluation losses: write evaluate=True, or keep_best=False.")
    if run.max_failures > 0 and run.launcher != "ray":
        raise ConfigError(
            f"max_failures={run.max_failures} is kept by Ray Train, and launcher={run.launcher!r} starts nothing "
            "again: write launcher='ray', or leave max_failures out and give the same command again, which goes on "
            "from the newest intact checkpoint."
        )


SHARDINGS = ("full_shard", "shard_grad_op", "hybrid_shard", "no_shard")
"""FSDP1's names of its strategies, in lower case."""


def _check_fsdp(engine: EngineConfig, parallel: ParallelConfig) -> None:
    if engine.sharding not in SHARDINGS:
        near = difflib.get_close_matches(engine.sharding, SHARDINGS, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"sharding is {engine.sharding!r}.{hint} Write one of: {', '.join(SHARDINGS)}.")
    if engine.name != "fsdp":
        for name in ("sharding", "shard_size", "wrap", "tp_plan"):
            value, default = getattr(engine, name), EngineConfig.__dataclass_fields__[name].default
            if value != default:
                raise ConfigError(
                    f"{name}={value!r} is a setting of engine='fsdp', not of engine={engine.name!r}. "
                    f"Leave it out, or write engine='fsdp'."
                )
        return
    if engine.precision == "fp16":
        raise ConfigError("engine='fsdp' scales no loss, which fp16 needs: write precision='bf16' or 'fp32'.")
    if engine.deepspeed_file:
        raise ConfigError("engine='fsdp' reads no DeepSpeed file: leave it out, or write engine='deepspeed'.")
    if engine.offload == "optimizer":
        raise ConfigError(
            "engine='fsdp' keeps parameters, gradients and optimizer states in one place: write offload='all', or "
            "offload='none'."
        )
    if engine.sharding == "no_shard" and engine.offload != "none":
        raise ConfigError(
            "sharding='no_shard' (DDP) has no offload: write offload='none', or another sharding, such as 'full_shard'."
        )
    if engine.sharding == "no_shard" and parallel.tp > 1:
        raise ConfigError(
            f"sharding='no_shard' (DDP) does not go with tp={parallel.tp}: write tp=1, or sharding='full_shard'."
        )
    if engine.sharding == "no_shard" and engine.wrap != "layer":
        raise ConfigError("sharding='no_shard' (DDP) gathers nothing: leave wrap out, or write sharding='full_shard'.")
    _check_shard_size(engine, parallel.dp)


def _check_shard_size(engine: EngineConfig, dp: int) -> None:
    if engine.sharding != "hybrid_shard":
        if engine.shard_size is not None:
            raise ConfigError(
                f"shard_size={engine.shard_size} belongs to sharding='hybrid_shard', not to {engine.sharding!r}. "
                "Leave it out, or write sharding='hybrid_shard'."
            )
        return
    possible = [size for size in range(2, dp) if dp % size == 0]
    if not possible:
        raise ConfigError(
            f"sharding='hybrid_shard' splits dp={dp} ranks into groups that share one copy, and {dp} cannot be split. "
            "Write sharding='full_shard', or a dp such as 4."
        )
    if engine.shard_size not in possible:
        raise ConfigError(
            f"sharding='hybrid_shard' shares a copy among shard_size ranks, and shard_size={engine.shard_size} does "
            f"not divide dp={dp} into several groups of several ranks. Write shard_size as one of {possible}."
        )


_LOWEST = {
    "seq_length": 2, "max_examples": 1, "max_eval_examples": 1, "dp": 1, "tp": 1, "persistence_threshold": 0,
    "shard_size": 1, "bucket_size": 1,
    "learning_rate": 0.0, "eps": 0.0, "weight_decay": 0.0, "gradient_clipping": 0.0, "warmup_steps": 0, "epochs": 1,
    "steps": 1, "stop_after": 1, "seed": 0, "global_batch": 1, "micro_batch": 1, "checkpoint_every": 0,
    "keep_last": 1, "max_failures": 0,
}  # fmt: skip


def _check_type(setting: Setting, value: Any) -> None:
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{setting.flag} is {value!r}. Write one of: {', '.join(map(str, setting.choices))}.")
    kinds: Any = {int: int, float: (int, float), str: str, bool: bool, int | None: (int, type(None)),
             str | None: (str, type(None)), tuple[str, ...]: tuple}[setting.type]  # fmt: skip
    wrong_bool = isinstance(value, bool) and setting.type is not bool
    if wrong_bool or not isinstance(value, kinds):
        name = getattr(setting.type, "__name__", str(setting.type))
        raise ConfigError(f"{setting.flag} is {value!r}, a {type(value).__name__}; write a value of type {name}.")


def _check_batch_sizes(config: Config) -> None:
    run, dp = config.run, config.parallel.dp
    if run.global_batch % dp:
        near = max(dp, run.global_batch // dp * dp)
        raise ConfigError(
            f"global_batch={run.global_batch} is not a multiple of dp={dp}: no rank can take an equal share. "
            f"Write global_batch={near} or {near + dp}."
        )
    share = run.global_batch // dp
    if run.micro_batch and share % run.micro_batch:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise ConfigError(
            f"Batch sizes do not multiply: global_batch={run.global_batch} = dp={dp} x micro_batch={run.micro_batch} "
            f"x accumulation has no whole accumulation. A rank's share is {share}; write micro_batch as one of "
            f"{divisors}."
        )
