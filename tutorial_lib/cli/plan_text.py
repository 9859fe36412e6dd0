"""Plan as text: the assumptions, the table of layouts, the best one with its reasons, or changes that make one fit."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from tutorial_lib.cli import plan_commands
from tutorial_lib.tables import align, format_short
from tutorial_lib.theory.cost import SLOWEST_SMALL_RUN, Candidate, backward_all_reduces, short_gb
from tutorial_lib.theory.layout_reasons import OFFLOAD_WARNING
from tutorial_lib.theory.layouts import Cluster, Workload, missing_for
from tutorial_lib.theory.remedies import Remedy

ROWS = 12
"""Number of table rows for layouts that fit; layouts that do not fit get half as many."""

LEFT_OUT = (
    "Left out: fragmentation, CUDA's and NCCL's own memory (--headroom covers them), latency of collectives, less "
    "efficient kernels on small micro-batches, torch.compile, float8, reading data. GB are 1e9 bytes. "
    "docs/planner-errors.md says how far off estimates are. Measure the layout you choose."
)

_COLUMNS = (
    "dp", "tp ", "sharding", "", "b", "rec", "off", "state", "activ", "bufs", "peak", "dp", "tp", "tok/s", "why not"
)  # fmt: skip
_WIDTHS = (3, 3, 14, 1, 2, 3, 3, 5, 5, 5, 5, 5, 5, 6, 0)
_NUMERIC = (True, True, False, False, True, False, False, *[True] * 7, False)
_GAPS = (" ", " ", "", "", *[" "] * 10)

_SHORT = {
    "host too small by": "host lacks", "global batch not divisible by": "batch not /", " traffic": "",
    "computing": "compute", "launches": "launch", "the update": "update",
    "as fast; holds more memory": "tie; more memory", "as fast": "tie",
}  # fmt: skip
"""Abbreviations of the plan's words for the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Everything that a plan shows.

    Args:
        workload: the training to plan.
        cluster: the devices.
        engine: the engine.
        gpu: name of the preset, if one was given.
        plausible: fields of the preset that are not measured.
        model: name of the model for ``train``.
        random_init: whether ``train`` starts from random weights.
        source: origin of the dimensions.
        candidates: all layouts, best first.
        here: the best layout that this course's engines can run, if any fits.
        why: reasons for the best layout.
        advice: changes that make something fit or, if the best layout offloads, make training faster.
        fewer: a smaller number of GPUs that is as fast in total, if there is one.
    """

    workload: Workload
    cluster: Cluster
    engine: str
    gpu: str
    plausible: tuple[str, ...]
    model: str
    random_init: bool
    source: str
    candidates: list[Candidate]
    here: Candidate | None
    why: list[str] = field(default_factory=list)
    advice: list[Remedy] = field(default_factory=list)
    fewer: Remedy | None = None


def write(answer: Answer, *, rows: int = ROWS) -> str:
    """Return the complete text; no line of the table is longer than 100 columns."""
    best = answer.candidates[0]
    lines = [*_assumptions(answer), "", f"{'GB per GPU':>44}{'GB sent/step':>18}{'per GPU':>10}"]
    lines += [*_table(answer, rows), ""]
    lines += _best(answer) if best.fits else _nothing_fits(answer)
    return "\n".join([*lines, "", *textwrap.wrap(LEFT_OUT, 100)])


def describe(candidate: Candidate) -> str:
    """Describe a layout: ``dp=8 tp=1 ZeRO-1, offload none, micro-batch 1``."""
    layout = candidate.layout
    text = f"dp={layout.dp} tp={layout.tp}{' with sequence parallelism' if layout.sequence_parallel else ''} "
    text += f"{layout.name}, offload {layout.offload}, micro-batch {layout.micro_batch}"
    if layout.checkpointing != "none":
        text += f", {layout.checkpointing} recomputation"
    if layout.strategy and layout.reduction == "each" and candidate.accumulation > 1:
        text += ", gradients reduced with every micro-batch"
    return text


def in_one_line(remedy: Remedy) -> str:
    """Describe a remedy and the best layout after it."""
    best = remedy.best
    how = f"dp={best.layout.dp} tp={best.layout.tp} {best.layout.name}, offload {best.layout.offload}"
    lacks = f"; this course's engines lack {', '.join(best.missing)}" if best.missing else ""
    return f"{remedy.change}: {format_short(best.tokens_per_gpu_second)} tokens/s per GPU with {how}{lacks}"


def _assumptions(answer: Answer) -> list[str]:
    work, machine = answer.workload, answer.cluster
    dims = work.dimensions
    of = f"{answer.gpu} GPUs" if answer.gpu else "GPUs"
    guessed = f"{', '.join(answer.plausible)}: plausible, not measured" if answer.plausible else ""
    if not answer.gpu:
        guessed = "an A100's speed and links, unless you state others: --gpu selects another GPU"
    trained = f", rank-{work.lora_rank} LoRA on {work.base_bits}-bit weights" if work.lora_rank else ""
    replicated = _three_digits(dims.replicated_params(answer.engine) / 1e6)
    lines = [
        f"{work.num_params / 1e9:.4g} B parameters, {work.precision}: {dims.layers} layers, hidden "
        f"{dims.hidden}, {dims.heads} heads ({dims.key_value_heads} kv), vocabulary {dims.vocabulary}{trained}",
        f"  dimensions: {answer.source}; replicated under tp: {replicated} M",
        f"{machine.gpus} {of} of {machine.gpu_memory / 1e9:g} GB ({format_short(machine.usable_memory / 1e9)} usable), "
        f"{machine.gpus_per_node} per node; {machine.gpu_flops / 1e12:g} TFLOP/s at {machine.efficiency:g} (HFU)",
        f"  GB/s: {machine.intra_node_bandwidth / 1e9:g} within a node, "
        f"{machine.inter_node_bandwidth / 1e9:g} between, {machine.host_link / 1e9:g} to the host; "
        f"{machine.host_memory / 1e9:g} GB of host memory per node",
        *([f"  {guessed}"] if guessed else []),
        f"  assumed: compute hides {machine.overlap:.0%} of dp traffic, {machine.headroom:.0%} of memory stays free, "
        f"host Adam {machine.host_adam / 1e9:g}e9 parameters/s",
        f"  sequences of {work.seq_length}; {_batch(work)}",
        *(
            [
                f"  below 1 B parameters, runs took up to {SLOWEST_SMALL_RUN} times as long as predicted: small "
                "kernels reach less of the peak"
            ]
            if work.num_params < 1e9
            else []
        ),
        *_communication(answer),
    ]
    return lines


def _batch(work: Workload) -> str:
    global_batch = f"{work.global_batch} per step" if work.global_batch else ""
    if work.micro_batch:
        return f"micro-batch {work.micro_batch}" + (f", {global_batch}" if global_batch else "")
    return f"{global_batch or 'no global batch given'}; the planner chooses the micro-batch (b)"


def _communication(answer: Answer) -> list[str]:
    """Return the assumptions about tensor parallelism's all-reduces and about reducing gradients."""
    work, engine = answer.workload, answer.engine
    backward = backward_all_reduces(work.dimensions, engine)
    forward = "2 forward, 1 recomputed" if work.checkpointing in ("selective", "full") else "2 forward"
    tp = f"  all-reduces per layer: {forward}, {backward} backward"
    if engine == "fsdp":
        return [
            f"{tp} (Megatron's plan)",
            "  gradients: reduced in fp32; once per step, or with every micro-batch as FSDP2 does by default",
        ]
    reduction = work.gradient_reduction
    note = "as in the paper; DeepSpeed's default is all_reduce"
    if reduction == "all_reduce":
        note = "DeepSpeed's default; reduce_scatter sends half"
    return [
        f"{tp} (AutoTP: {backward} column-parallel layers)",
        f"  gradients of stages 1 and 2: {reduction} ({note})",
    ]


def _table(answer: Answer, rows: int) -> list[str]:
    fitting = [c for c in answer.candidates if c.fits]
    others = [c for c in answer.candidates if not c.fits]
    shown, best = fitting[:rows], answer.candidates[0]
    if answer.here and answer.here not in shown:
        shown = [*shown[: rows - 1], answer.here]
    listed = [*shown, *others[: max(1, rows // 2)]]
    lines = align([_COLUMNS, *(_row(candidate, best) for candidate in listed)], _NUMERIC, least=_WIDTHS, gaps=_GAPS)
    hidden = len(answer.candidates) - len(listed)
    lines.append(" peak may be below state + activ + bufs: state counts gradients that do not exist at the peak")
    marks = {
        "s: tp with sequence parallelism": any(c.layout.sequence_parallel for c in answer.candidates),
        "u: Ulysses": any(c.layout.ulysses for c in answer.candidates),
        "i: interleaved": any(c.layout.chunks > 1 for c in answer.candidates),
    }
    if any(marks.values()):
        lines.append(f" {'; '.join(mark for mark, is_used in marks.items() if is_used)}")
    if any(candidate.missing for candidate in answer.candidates):
        lines.append(" * not in this course's engines (--only-here leaves such layouts out)")
    return lines + ([f" ... {hidden} more: --rows {len(answer.candidates)}, or --json"] if hidden > 0 else [])


def _row(candidate: Candidate, best: Candidate) -> tuple[str, ...]:
    layout = candidate.layout
    off = {"none": "-", "optimizer": "opt", "all": "all"}[layout.offload]
    recompute = {"none": "-", "selective": "sel", "full": "all"}[layout.checkpointing]
    gigabytes = [
        _three_digits(size / 1e9)
        for size in (candidate.states, candidate.activations, candidate.buffers, candidate.memory,
                     candidate.dp_traffic + candidate.cp_traffic, candidate.tp_traffic)
    ]  # fmt: skip
    why = candidate.problem or candidate.slower or ("the best" if candidate is best else "this course's best")
    for long, short in _SHORT.items():
        why = why.replace(long, short)
    return (
        str(layout.dp), f"{layout.tp}{'s' if layout.sequence_parallel else ' '}",
        layout.name.replace("shard_grad_op ", "grad_op "), "*" if candidate.missing else "", str(layout.micro_batch),
        recompute, off, *gigabytes, format_short(candidate.tokens_per_gpu_second), why,
    )  # fmt: skip


def _best(answer: Answer) -> list[str]:
    best = answer.candidates[0]
    fitting = sum(candidate.fits for candidate in answer.candidates)
    phase = "in backward" if best.peak_phase == "backward" else f"at the {best.peak_phase}"
    lines = [
        f"Best: {describe(best)}. Of {len(answer.candidates)} layouts, {fitting} fit.",
        f"{format_short(best.tokens_per_gpu_second)} tokens/s per GPU, {format_short(best.seconds)} s per step of "
        f"{best.tokens // answer.workload.seq_length} sequences, accumulation {best.accumulation}; "
        f"{best.compute_seconds / best.seconds:.0%} of that is computing{_launch_share(best)}. Memory peaks {phase}.",
        *(f"  {sentence}" for sentence in answer.why),
    ]
    if answer.fewer:
        fewer, all_of_them = (format_short(c.tokens_per_gpu_second * c.layout.gpus) for c in (answer.fewer.best, best))
        lines.append(
            f"Fewer GPUs are as fast: {answer.fewer.change} gives {fewer} tokens/s in total; all "
            f"{answer.cluster.gpus} give {all_of_them}."
        )
    runs = best if not best.missing else answer.here
    if best.missing:
        lines.append(f"This course's engines do not have: {', '.join(best.missing)}.")
        if runs:
            lines.append(f"The best that they can run: {describe(runs)}: {how_much_slower(runs, best)}.")
            if runs.layout.offload != "none" and best.layout.offload == "none":
                lines.append(f"  {OFFLOAD_WARNING}")
        elif not missing_for(answer.workload, answer.engine):
            lines.append("None of the layouts that they can run fits.")
    if answer.advice:
        lines += ["Faster, and without offload:", *_advice(answer)]
    if runs:
        lines += [
            "",
            *plan_commands.in_words(
                answer.workload, answer.cluster, runs, answer.model, random_init=answer.random_init
            ),
        ]
    return lines


def _launch_share(best: Candidate) -> str:
    share = best.launch_wait_seconds / best.seconds
    return f", {share:.0%} waiting for Python to launch kernels" if share >= 0.01 else ""


def how_much_slower(one: Candidate, best: Candidate) -> str:
    """Say how many percent slower a layout is than the best one."""
    percent = round(100 * (best.tokens_per_gpu_second / one.tokens_per_gpu_second - 1))
    if percent == 0:
        return "as fast"
    return f"{percent:,} % slower" if percent > 0 else f"{-percent} % faster, which counts as a tie"


def _nothing_fits(answer: Answer) -> list[str]:
    hopeless = "No change that this planner knows of would help. Try fewer parameters, or shorter sequences."
    lines = ["Nothing fits. These changes would help, fastest first:" if answer.advice else f"Nothing fits. {hopeless}"]
    lines += _advice(answer)
    smallest = min(answer.candidates, key=lambda c: c.memory)
    lines.append(f"The smallest layout needs {short_gb(smallest.memory)} GB per GPU: {describe(smallest)}.")
    return lines


def _advice(answer: Answer) -> list[str]:
    lines = []
    for remedy in answer.advice:
        best = remedy.best
        lacks = f"; not in this course: {', '.join(best.missing)}" if best.missing else ""
        lines.append(f"  {remedy.change}")
        lines.append(f"    {format_short(best.tokens_per_gpu_second)} tokens/s per GPU with {describe(best)}{lacks}")
    if any(remedy.best.layout.offload != "none" for remedy in answer.advice):
        lines.append(f"  {OFFLOAD_WARNING}")
    return lines


def _three_digits(number: float) -> str:
    """Format a number for a narrow column: about three digits, in at most five characters below 100,000."""
    if number == 0:
        return "0"
    if number < 0.001:
        return f"{number:.0e}".replace("e-0", "e-")
    decimals = 3 if number < 1 else 2 if number < 10 else 1 if number < 1000 else 0
    return f"{number:.{decimals}f}"
