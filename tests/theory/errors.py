"""Error table of the planner: predictions beside published runs and our own, with a reason for each miss.

``python -m tests.theory.errors`` writes docs/planner-errors.md. ``python -m tests.theory.errors measure`` first trains
the small runs of the page's second part again (about two minutes), and writes measured.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.theory import gpu_runs
from tests.theory.gpu_runs import GpuRun
from tests.theory.published import FALCON, GIB, OUTSIDE, ROWS, Published
from tutorial_lib.cli.plan_check import Compared, compare_predictions
from tutorial_lib.config import Config
from tutorial_lib.engine.predictions import workload_and_layout
from tutorial_lib.models.dimensions import read_config
from tutorial_lib.tables import Table
from tutorial_lib.theory.cost import OFFLOADED_RUN
from tutorial_lib.theory.known_models import MODELS
from tutorial_lib.theory.layouts import Cluster, Layout, Workload
from tutorial_lib.theory.plan import plan

PAGE = Path(__file__).parents[2] / "docs" / "planner-errors.md"
MEASURED = Path(__file__).with_name("measured.json")
HEADROOM = 0.1
"""Share of a device that the planner keeps free, for fragmentation and memory outside PyTorch."""

MEMORY_GOAL, TIME_GOAL = 0.10, 0.20


@dataclass(frozen=True)
class Errors:
    """Relative errors of the predictions for a published run; None if nothing was published.

    Published memory is what an allocator reserved or a tool saw, so the prediction includes its headroom.
    """

    run: Published
    speed: float
    memory: float
    speed_error: float
    memory_error: float | None

    @property
    def is_judged(self) -> bool:
        """Return True if the time model covers the run."""
        return not self.run.not_modelled


def errors_of(run: Published) -> Errors:
    """Return a published run's errors."""
    predicted = run.predict()
    memory = predicted.memory / (1 - HEADROOM)
    assert run.speed is not None
    return Errors(
        run, predicted.tokens_per_gpu_second, memory, predicted.tokens_per_gpu_second / run.speed - 1,
        memory / run.memory - 1 if run.memory else None,
    )  # fmt: skip


def own_runs() -> Iterator[tuple[Config, list[Compared]]]:
    """Yield our own small runs, with predictions and measurements for each."""
    for row in json.loads(MEASURED.read_text(encoding="utf-8")):
        config = Config.create("cpu", **row["settings"])
        yield config, compare_predictions(config, [row["measured"]])


def measure() -> None:
    """Train the runs of measured.json again, and write the memory and traffic of the rank that holds most in each."""
    from tutorial_lib import launch

    settings = [row["settings"] for row in json.loads(MEASURED.read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory() as storage:
        base = {"storage": storage, "steps": 4, "measure": True, "evaluate": False, "max_examples": 200}
        configs = [Config.create("cpu", **flat, **base, name=f"run-{n}") for n, flat in enumerate(settings)]
        sizes = sorted({config.parallel.world_size for config in configs})
        together = [[config for config in configs if config.parallel.world_size == size] for size in sizes]
        runs = {run.config.run.name: run for configs in together for run in launch.run_all(configs)}
    rows = []
    for n, flat in enumerate(settings):
        run = runs[f"run-{n}"]
        ranks = [rank["measured"] for rank in run.result["ranks"]]
        most = max(ranks, key=lambda rank: sum(rank["peak_bytes"].values()))
        measured = {
            "state_bytes": {"total": max(rank["state_bytes"]["total"] for rank in ranks)},
            "peak_bytes": most["peak_bytes"],
            "traffic": {"wire_bytes": most["traffic"]["wire_bytes"]},
        }
        rows.append(json.dumps({"settings": flat, "measured": measured}))
    MEASURED.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def page() -> str:
    """Return the text of ``docs/planner-errors.md``."""
    errors = [errors_of(run) for run in ROWS]
    judged = [e for e in errors if e.is_judged]
    with_memory = [e for e in errors if e.memory_error is not None]
    own = list(own_runs())
    good_memory = sum(abs(e.memory_error or 0) <= MEMORY_GOAL for e in with_memory)
    low = sum((e.memory_error or 0) < 0 for e in with_memory)
    good_time = sum(abs(e.speed_error) <= TIME_GOAL for e in judged)
    worst = {n: max(abs(rows[n].error) for _, rows in own) for n in range(3)}
    return f"""\
# How far off the planner is

`python -m tutorial_lib plan` counts bytes and operations. This page compares its predictions with {len(ROWS)}
published runs and {len(own)} of our own. No constant was fitted to a published run. Only the time that launching
kernels takes was fitted to our own ([part 5](#5-our-own-gpu-runs)). The share of a GPU's peak that
training reaches, and the bandwidth of its links, were measured by others
([hardware.py](../tutorial_lib/theory/hardware.py) names them). Our own runs showed which bytes exist at the same
time: part 2 shows how well the planner describes those runs, and part 1 how well it generalises. (Published runs
exposed three bugs, now fixed: a pipeline's pending gradients were counted twice, a norm's memory was not divided among
the ranks, and the matrix of scores of attention without a fused kernel took no time. Its bytes now
count, as BLOOM's operators move them.)

- **Memory of published runs**: {good_memory} of {len(with_memory)} within {MEMORY_GOAL:.0%}.
  {low} of the {len(with_memory)} predictions are too low, which is the dangerous side: a layout that should fit may
  not. Leave some room, or raise `--headroom`. Falcon 7B's memory is not counted, because its settings are unknown:
  with those that its speed suggests, ZeRO-3's prediction is much too low (see "Not compared" below).
- **Speed of published runs** that the model covers: {good_time} of {len(judged)} within {TIME_GOAL:.0%}.
  None of those uses tensor, context or pipeline parallelism, because published runs with these also use torch.compile
  and float8, which the model leaves out. One of the {len(judged)} uses offload, for which the model is
  {OFFLOADED_RUN:g} times too fast.
- **Our own runs**: model states within {worst[0]:.1%}, peak of a step within {worst[1]:.1%}, bytes sent within
  {worst[2]:.1%}.
{_gpu_summary()}
- **Not checked on this page**: anything about {_listed(_without_rows())}, and the speed of
  {_listed(_without_speed())} ([part 3](#3-rows-per-kind-of-layout)).

## 1. Published runs

Memory is the predicted peak divided by {1 - HEADROOM:g}. Published figures are what PyTorch's allocator had *reserved*
(torchtitan) or what `nvidia-smi` showed (KAUST); the planner's default headroom of {HEADROOM:.0%} accounts for the
difference. Without it, every memory figure would be a tenth lower. Speed is in tokens per second per GPU. An error is
predicted / published - 1. Speeds in brackets are shown for information: those runs use something that the time model
leaves out (torch.compile, or torch.compile and float8, as their names say), or their settings are assumed.

{_table(_PUBLISHED, [_published_row(e) for e in errors])}

Why predictions are off by more than {MEMORY_GOAL:.0%} in memory or {TIME_GOAL:.0%} in speed, as far as we know:

{chr(10).join(f"- **{e.run.name}**: {_reason(e)}" for e in errors if _misses(e))}

Assumptions: torchtitan with a pipeline runs as many micro-batches as stages (its default at the time), its H100s of
96 GB and 500 W are as fast as those of 80 GB and 700 W, and Granite's runs recompute ({ROWS[17].why}).

{FALCON.name}: {FALCON.not_modelled}.
So this row is no check of the planner's speed for plain ZeRO-3, and the row with everything offloaded, which uses the
same settings, only checks what offload adds.

Speeds depend on the preset's efficiency, which depends on the runs it is taken from. The H100's 0.42 is the median of
llm-foundry's runs with 1 B parameters or more. From 7 B on the median is 0.48; with it, the first row's speed would be
29 % too high.

Not compared:

{chr(10).join(f"- {name}: {why}" for name, why in OUTSIDE)}

Sources, in the order of the table: {"; ".join(dict.fromkeys(run.source for run in ROWS))}.

## 2. Our own runs

These runs use two processes on a CPU (or four, if the row says so), the embedded models with four layers, and full
(packed) rows. `train --measure` measured their third step. The peak is the memory that the step allocated beyond the
existing weights and moments. Bytes are those of the rank that holds the most. Rows with selective recomputation or
`each reduced` (gradients reduced with every micro-batch) came after the first ones. The planner had formulas for their
memory before the engines supported either. (Only one rule came with that support: BLOOM's attention is recomputed,
because it has no fused kernel.)

Rows with offload or `hybrid_shard` were measured last, and two of them exposed errors, now fixed. For ZeRO-1 with an
offloaded optimizer and one micro-batch, the plan put gradients on the device that are really on the host. (With several
micro-batches, full gradients wait on the device as well.) And `plan --check` counted FSDP2's offloaded gradients twice.
On a CPU, device and host are the same memory, so rows with offload check the sum of both, and say nothing about time.
The peak of `hybrid_shard` with `each reduced` differs by up to a tenth from run to run.

{_table(_OWN, [_own_row(config, rows) for config, rows in own])}

The predicted peaks probably lack the mask of packed rows. Models of 3 MB have different errors than large ones: an
error of one percent here may vanish there, and vice versa.

## 3. Rows per kind of layout

These are the numbers of rows above, without speeds in brackets. Layouts without rows are planned with the same
formulas, but this page compares none of them with a run.

{_table(_COVERED, list(_coverage()))}

## 4. An answer that differs from an expert's

{_large_case()}

{_gpu_section()}

`python -m tests.theory.errors` writes this page.
"""


_KINDS: dict[str, Callable[[Workload, Layout], bool]] = {
    "DeepSpeed's ZeRO": lambda _, layout: layout.strategy is None and layout.zero_stage > 0,
    "FSDP": lambda _, layout: layout.strategy not in (None, "no_shard", "hybrid"),
    "hybrid sharding": lambda _, layout: layout.strategy == "hybrid",
    "offload": lambda _, layout: layout.offload != "none",
    "tensor parallelism": lambda _, layout: layout.tp > 1 and not layout.sequence_parallel,
    "tensor and sequence parallelism": lambda _, layout: layout.sequence_parallel,
    "context parallelism by ring": lambda _, layout: layout.cp > 1 and not layout.ulysses,
    "context parallelism by Ulysses": lambda _, layout: layout.ulysses,
    "pipelines": lambda _, layout: layout.pp > 1,
    "LoRA": lambda work, _: work.lora_rank > 0,
    "8-bit or bf16 moments": lambda work, _: work.moments != "fp32",
    "loss in chunks": lambda work, _: work.loss_chunks > 1,
}


def _coverage() -> Iterator[tuple[str, str, str, str]]:
    """Yield, for each kind of layout, the numbers of published memory figures, published speeds, and own runs."""
    own = [workload_and_layout(config, *read_config(config.model.name)) for config, _ in own_runs()]
    for kind, holds in _KINDS.items():
        published = [run for run in ROWS if holds(run.workload, run.layout)]
        counts = (
            sum(run.memory is not None for run in published), sum(not run.not_modelled for run in published),
            sum(holds(*pair) for pair in own),
        )  # fmt: skip
        yield kind, *(str(count) for count in counts)  # type: ignore[misc]


def _listed(kinds: list[str]) -> str:
    return ", ".join(kinds[:-1]) + " and " + kinds[-1]


def _without_speed() -> list[str]:
    """Return the kinds of layout that have rows, but no published speed."""
    return [kind for kind, memory, speed, own in _coverage() if speed == "0" and {memory, own} != {"0"}]


def _without_rows() -> list[str]:
    return [kind for kind, *counts in _coverage() if set(counts) == {"0"}]


_COVERED = ("layout", "published memory", "published speed", "own runs: memory, bytes sent")
_PUBLISHED = ("run", "memory, GiB: predicted", "published", "error", "tokens/s: predicted", "published", "error")


def _gpu_summary() -> str:
    workshop, fsdp = list(gpu_runs.workshop_runs()), list(gpu_runs.fsdp_runs())
    states = max(abs(run.states[0] / run.states[1] - 1) for run in workshop if run.states)
    peaks = [abs(run.peak_error) for run in (*workshop, *fsdp) if not run.peaks_at_update]
    updates = [abs(error) for error in gpu_runs.update_errors()]
    busy = [abs(run.seconds[0] / run.seconds[1] - 1) for run in fsdp if not run.is_fitted]
    fitted = [abs(run.seconds[0] / run.seconds[1] - 1) for run in (*workshop, *fsdp) if run.is_fitted]
    others = [run.times_too_fast for run in workshop if not run.is_fitted]
    return f"""\
- **Our own GPU runs** (one H200, [part 5](#5-our-own-gpu-runs)): model states within {states:.1%}, peak of a step
  within {max(peaks):.1%}, of an update within {max(updates):.1%}, in part because these runs led us to fix the planner.
  Seconds per step are within {max(busy):.0%} for 1 B parameters and micro-batches of 16 rows or more (FSDP2). They are
  also within {max(fitted):.0%} where the GPU waits for Python to launch kernels, but the time of a launch was fitted to
  these runs. Other runs of small models took {min(others):.1f} to {max(others):.1f} times as long as predicted."""


def _gpu_section() -> str:
    workshop, fsdp = list(gpu_runs.workshop_runs()), list(gpu_runs.fsdp_runs())
    updates = [abs(error) for error in gpu_runs.update_errors()]
    trace = {each["case"]: each for each in gpu_runs.measured("traces")}
    small, large = (trace[f"bloom-560m, ZeRO-0, micro-batches of {size}"] for size in (4, 16))
    share = [each["busy_seconds"] / each["step_seconds_without_profiler"] for each in (small, large)]
    machine = gpu_runs.measured("environment")["machine"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "deepspeed"))
    num_params = gpu_runs.measured("fsdp2-one-billion")[0]["num_params"]
    runs = {run["case"]: run for run in gpu_runs.measured("workshop")}
    one = runs["bloom-560m: ZeRO-0, micro-batches of 16"]
    planned = next(run.seconds[0] for run in workshop if run.name == one["case"])
    ceiling = one["mfu"] * one["step_seconds"]["median"] / large["busy_seconds"]
    best = max(row["mfu"] for table in gpu_runs.measured("fsdp2-one-billion") for row in table["rows"])
    return f"""\
## 5. Our own GPU runs

These runs used one NVIDIA H200 in a virtual machine with {machine["cores"]} cores, on 27 November 2026, in bf16, with
{versions} ([figures](measured/h200), written by `python tests/gpu/measure.py`). A single GPU has no others to share
states with, and sends nothing.

### The workshop's models

Weights are random. A step has four micro-batches of four full sequences (bloom-560m: 512 tokens, gpt2: 1024), unless a
run's name says otherwise. Memory is in GiB, and the peak is the memory that a step adds. Below stage 3, without
offload, gradients count in both the states and the peak.

{_table(_GPU_RUNS, [_gpu_row(run) for run in workshop])}

In all of them memory peaks at the loss. The update's own peak was measured in {len(updates)} runs, and is predicted
within {max(updates):.1%}. These runs exposed errors in the planner's memory, now fixed: DeepSpeed's fp32 copy of
16-bit gradients at the update was missing, and so were the tensors that autocast keeps in fp32 (which made gpt2's peak
17% too low). For stage 3 on a single rank, the planner counted gathered copies that do not exist.

With micro-batches of four, the GPU waits for Python to launch kernels. The planner counts this as a time per layer and
micro-batch ([launches.py](../tutorial_lib/theory/launches.py)), fitted to the runs without offload that wait and to
FSDP2's below. So these rows describe the fit, and do not test it; another host may be faster or slower. A profiler
showed how much the time differs even here (earlier the same day, in another start of the machine, where stage 0 took
{small["step_seconds_without_profiler"]:.2f} s per step). A step of bloom-560m with four micro-batches of four launched
{small["kernel_calls"]:,} kernels, and the GPU was busy {share[0]:.0%} of the time. With one micro-batch of 16, it was
busy {share[1]:.0%} of the time. Without any waiting, that step would reach only {ceiling:.0%} of the data sheet's peak,
because most of its longest kernels copy, convert and add numbers. Its kernels alone take longer than the
{planned:.2f} s that the planner predicts for everything. Stage 3 runs Python hooks around every module, even with
nothing to gather, and is the slowest without offload. Offload to pageable memory copies more slowly than the planner
assumes.

### FSDP2: about 1 B parameters, by micro-batch

The model has GPT-2's architecture and {num_params / 1e9:.2f} B parameters. A step is one micro-batch of sequences of
1024 tokens. Memory is in GiB, and the peak is the most that PyTorch's allocator had in use at once. The best step
reached {best:.1%} of the data sheet's 989 TFLOP/s (MFU).

{_table(_GPU_FSDP, [_gpu_fsdp_row(run) for run in fsdp])}

With micro-batches of up to 8 rows, the GPU waits for launches, and the planner's time per layer was fitted to them.

In rows marked with *, memory peaks at the update, where AdamW copied all parameters in fp32. FSDP2's AdamW is now fused
and makes no copy. Its losses, resume, memory and speed were all measured before that change, and not again since. The
plan leaves out cuBLAS's workspaces ({gpu_runs.WORKSPACE // 2**20} MiB). Micro-batch 64 did not fit; with recomputation,
256 did not."""


_GPU_RUNS = (
    "run", "states: predicted", "measured", "error", "peak: predicted", "measured", "error", "s/step: predicted",
    "measured",
)  # fmt: skip
_GPU_FSDP = ("run", "peak: predicted", "measured", "error", "s/step: predicted", "measured", "error")


def _gpu_row(run: GpuRun) -> tuple[str, ...]:
    assert run.states is not None
    (states, counted), (peak, reached) = run.states, run.peak
    return (
        run.name, f"{states / GIB:.2f}", f"{counted / GIB:.2f}", f"{states / counted - 1:+.1%}", f"{peak / GIB:.2f}",
        f"{reached / GIB:.2f}", f"{run.peak_error:+.1%}", *(f"{seconds:.3f}" for seconds in run.seconds),
    )  # fmt: skip


def _gpu_fsdp_row(run: GpuRun) -> tuple[str, ...]:
    mark = " *" if run.peaks_at_update else ""
    return (
        run.name, f"{run.peak[0] / GIB:.1f}", f"{run.peak[1] / GIB:.1f}{mark}", f"{run.peak_error:+.1%}",
        *(f"{seconds:.3f}" for seconds in run.seconds), f"{run.seconds[0] / run.seconds[1] - 1:+.0%}",
    )  # fmt: skip


_OWN = ("run", "states: predicted", "measured", "error", "peak: predicted", "measured", "error", "sent: error")


def _large_case() -> str:
    """Return the planner's answer for 405 B on 512 H100s, beside the layout that experts would choose."""
    dims = MODELS["llama-3-405b"]
    task = Workload(num_params=dims.num_params, dimensions=dims, seq_length=8192)
    found = [c for c in plan(task, Cluster.of("h100", 512), "fsdp") if c.fits]
    best = found[0].layout
    sequence = " with sequence parallelism" if best.sequence_parallel else ""
    alone, interleaved, piped = (
        next(c for c in found if (c.layout.tp, c.layout.pp, c.layout.chunks) == (8, pp, chunks))
        for pp, chunks in ((1, 1), (8, 2), (8, 1))
    )
    (run,) = [r for r in ROWS if (r.layout.pp, r.layout.chunks) == (8, 1)]
    assert run.memory is not None and piped.layout == run.layout
    return f"""\
`tests/unit/theory/test_plan_advice.py` asks the planner nine ordinary questions. One is Llama 3 405B at 8,192 tokens on
512 H100 of 80 GB. The planner's best layout is dp {best.dp} x tp {best.tp}{sequence}
({best.strategy}). An expert would say tp 8 with a pipeline of about 8 stages. The planner thinks that this fits,
too, but is slower (tokens/s are per GPU, each row has its best micro-batch):

| layout | tokens/s | the planner's verdict |
| --- | ---: | --- |
| dp {best.dp} x tp {best.tp} | {found[0].tokens_per_gpu_second:.0f} | the best |
| dp {alone.layout.dp} x tp 8 | {alone.tokens_per_gpu_second:.0f} | {alone.slower} |
| dp 8 x tp 8 x pp 8, interleaved | {interleaved.tokens_per_gpu_second:.0f} | {interleaved.slower} |
| dp 8 x tp 8 x pp 8 | {piped.tokens_per_gpu_second:.0f} | {piped.slower} |

Do not choose by this table. No published speed checks tp or pipelines (part 3), so such differences may well be errors.
The planner ignores the latency of collectives among hundreds of ranks and assumes that compute hides 80 % of their
time; both favour a large dp. The last row may not even fit 80 GB, because it is the layout of the published run in part
1, whose GPUs of 96 GB held {run.memory / GIB:.1f} GiB ({run.memory / 1e9:.1f} GB)."""


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return Table(columns, tuple(rows), (False, *[True] * (len(columns) - 1))).markdown()


def _published_row(e: Errors) -> tuple[str, ...]:
    speed = (f"{e.speed:,.0f}", f"{e.run.speed:,.0f}", f"{e.speed_error:+.0%}")
    if not e.is_judged:
        speed = tuple(f"({text})" for text in speed)  # type: ignore[assignment]
    memory = ("", "", "")
    if e.run.memory and e.memory_error is not None:
        memory = (f"{e.memory / GIB:.1f}", f"{e.run.memory / GIB:.1f}", f"{e.memory_error:+.0%}")
    return (e.run.name, *memory, *speed)


def _misses(e: Errors) -> bool:
    memory = e.memory_error is not None and abs(e.memory_error) > MEMORY_GOAL
    return memory or abs(e.speed_error) > TIME_GOAL


def _reason(e: Errors) -> str:
    return "; ".join(
        part for part in (f"{e.run.not_modelled} not modelled" if e.run.not_modelled else "", e.run.why) if part
    )


def _own_row(config: Config, rows: list[Compared]) -> tuple[str, ...]:
    engine = config.engine
    name = {"fsdp": engine.sharding, "deepspeed": f"ZeRO-{engine.zero_stage}"}[engine.name]
    words = [config.model.name.removeprefix("embedded/"), name]
    words += [f"tp {config.parallel.tp}"] if config.parallel.tp > 1 else []
    words += [f"{config.parallel.dp} ranks"] if config.parallel.dp > 2 else []
    words += [f"groups of {engine.shard_size}"] if engine.shard_size else []
    words += [f"{engine.offload} offloaded"] if engine.offload != "none" else []
    words += [engine.precision] if engine.precision != "fp32" else []
    if engine.activation_checkpointing:
        words.append("selective" if engine.recompute == "selective" else "recomputed")
    words += [f"{config.accumulation} micro-batches"] if config.accumulation > 1 else []
    words += ["each reduced"] if engine.reduce_each else []
    words += [f"rows of {config.data.seq_length} tokens"] if config.data.seq_length != 128 else []
    states, peak, sent = rows
    cells = [f"{states.predicted:,.0f}", f"{states.measured:,.0f}", f"{states.error:+.1%}"]
    cells += [f"{peak.predicted:,.0f}", f"{peak.measured:,.0f}", f"{peak.error:+.1%}", f"{sent.error:+.1%}"]
    return (", ".join(words), *cells)


def main(arguments: list[Any]) -> None:
    """Measure, if asked to, and write the page."""
    if arguments == ["measure"]:
        measure()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
