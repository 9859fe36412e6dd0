"""Command ``plan``: the layouts that fit given devices, fastest first, and why the others are worse.

The arithmetic is in :mod:`tutorial_lib.theory`. This module has the command's arguments and its two forms: a plan, or
(``--check RUN``) a comparison with a run that was measured. A plan imports neither torch nor transformers, unless
``--model`` names a model that is not in :mod:`tutorial_lib.theory.known_models`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import Any

from tutorial_lib.cli import plan_check, plan_commands, plan_text
from tutorial_lib.cli.options import add_model_config, model_of, path_of
from tutorial_lib.cli.plan_models import SEQ_LENGTH, find_model
from tutorial_lib.cli.plan_text import Answer
from tutorial_lib.config import ConfigError
from tutorial_lib.config.checks import check_path
from tutorial_lib.theory.activations import CHECKPOINTING
from tutorial_lib.theory.cost import Candidate, backward_all_reduces
from tutorial_lib.theory.hardware import GPUS, find_gpu, peak_flops
from tutorial_lib.theory.layout_reasons import reasons
from tutorial_lib.theory.layouts import ENGINES, MOMENTS, PRECISIONS, Cluster, Workload, missing_for
from tutorial_lib.theory.plan import plan
from tutorial_lib.theory.remedies import faster_than_offload, fewer_gpus, remedies

FITS, NOTHING_FITS = 0, 2

_DEFAULT_GPU = "a100-80"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan``, except ``--json``, which every command has."""
    preset = GPUS[_DEFAULT_GPU]

    def number(flag: str, kind: Any, help: str, default: Any = None) -> None:
        parser.add_argument(flag, type=kind, help=help, default=default, metavar=flag.rpartition("-")[2].upper())

    parser.description = (
        "Predict memory, traffic and speed of every dp x tp x sharding x offload on given GPUs, each with its best "
        "micro-batch and activation checkpointing. Dense decoders only: a mixture of experts is refused. "
        + plan_text.LEFT_OUT
    )
    parser.add_argument("--model", help="llama-3-70b or another public model, a hub name, directory or embedded/...")
    add_model_config(parser)
    parser.add_argument(
        "--random-init", action="store_true", help="with --model-config, as for train; plan reads no weights anyway"
    )
    number(
        "--model-size",
        _parse_size,
        "parameters, such as 7e9 or 7B: the public model of this size, or a shape derived from it",
    )
    for name, help in (
        ("layers", "number of layers"), ("hidden", "hidden size"), ("heads", "number of attention heads"),
        ("vocabulary", "size of the vocabulary"),
    ):  # fmt: skip
        number(f"--{name}", int, f"with --model-size: {help}")
    number("--gpus", int, "total number of devices")
    parser.add_argument(
        "--gpu", type=str.lower, help=f"preset: {', '.join(GPUS)} (without one: --gpu-memory, and an A100's speed)"
    )
    number("--gpu-memory", float, "memory of one device in GB")
    number("--seq-length", int, f"tokens per sequence (default: {SEQ_LENGTH}, or a model's learned positions)")
    number("--micro-batch", int, "sequences per forward pass and data-parallel rank (default: the planner chooses)")
    number("--global-batch", int, "sequences per optimizer step (default: one micro-batch per rank)")
    parser.add_argument("--precision", help=f"{', '.join(PRECISIONS)} (default: bf16; fp16 where a GPU has no bf16)")
    parser.add_argument("--engine", default="deepspeed", help=f"{', '.join(ENGINES)} (default: deepspeed)")
    parser.add_argument(
        "--gradient-reduction", default="all_reduce",
        help="how stages 1 and 2 reduce gradients: all_reduce (default, as DeepSpeed does), or reduce_scatter, as in "
        "the paper, with half the volume (the printed file then sets use_multi_rank_bucket_allreduce to false)",
    )  # fmt: skip
    parser.add_argument(
        "--activation-checkpointing", nargs="?", const="full", choices=CHECKPOINTING,
        help="how much backward recomputes; without a value, full (default: the planner chooses)",
    )  # fmt: skip
    number("--lora", int, "train only adapters of this rank", 0)
    number("--base-bits", int, "with --lora: bits per frozen weight: 16 (default), 8 or 4 (QLoRA)")
    parser.add_argument("--moments", default="fp32", help=f"Adam's moments in {', '.join(MOMENTS)} (default: fp32)")
    number("--loss-chunks", int, "number of chunks in which output layer and loss are computed (default: 1)", 1)
    parser.add_argument(
        "--only-here", action="store_true",
        help="leave out layouts that this course's engines lack: cp, pp, sequence parallelism, tp of some models",
    )  # fmt: skip
    number("--bucket-size", int, "elements of DeepSpeed's buckets (default: 500000000, DeepSpeed's own)", 500_000_000)
    number("--gpus-per-node", int, f"devices of a node; tp stays within one (default: {preset.gpus_per_node})")
    number("--host-memory", float, "memory of a node in GB, for offload (default: 1000)", 1000.0)
    number("--gpu-tflops", float, "peak of one device in the run's precision (default: the preset's, or an A100's)")
    number("--efficiency", float, "share of the peak that training reaches, HFU (default: the preset's)")
    number("--bandwidth-within", float, "GB/s that a device sends within its node (default: the preset's)")
    number("--bandwidth-between", float, "GB/s of a device's share of its node's network (default: the preset's)")
    number("--bandwidth-host", float, "GB/s between a device and its host (default: the preset's)")
    number("--host-adam", float, "1e9 parameters/s that Adam updates on a node's CPUs (default: 4, an assumption)", 4.0)
    number("--overlap", float, "share of dp traffic that compute can hide (default: 0.8, an assumption)", 0.8)
    number("--headroom", float, "share of device memory to keep free (default: 0.1, an assumption)", 0.1)
    number("--rows", int, f"table rows for layouts that fit (default: {plan_text.ROWS})", plan_text.ROWS)
    parser.add_argument(
        "--check", metavar="RUN",
        help="compare with the memory and traffic of a run of `train --measure`; with --gpu, its time as well",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Print the plan, and return 0, or 2 if nothing fits.

    Raises:
        ConfigError: the arguments are impossible.
    """
    if options.check:
        _refuse_others(options)
        print(plan_check.describe_predictions(options.check, gpu=options.gpu, as_json=options.json))
        return FITS
    answer = _answer(options)
    if options.json:
        print(json.dumps(_document(answer), indent=2))
    else:
        print(plan_text.write(answer, rows=options.rows))
    return FITS if answer.candidates[0].fits else NOTHING_FITS


def _refuse_others(options: argparse.Namespace) -> None:
    """Refuse options that ``--check`` would ignore.

    Raises:
        ConfigError: names them.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    others = [name for name, value in defaults.items() if getattr(options, name) != value]
    if flags := [f"--{name.replace('_', '-')}" for name in others if name not in ("check", "gpu")]:
        raise ConfigError(f"--check takes the run's settings from its records. Leave out {', '.join(flags)}.")


def _answer(options: argparse.Namespace) -> Answer:
    _check_numbers(options)
    given = {name: getattr(options, name) for name in ("layers", "hidden", "heads", "vocabulary")}
    model = model_of(options)
    if model is not None:
        check_path("model", model)
        model = str(path_of(model)) if model.startswith("~") else model
    found = find_model(model, options.model_size, given, options.seq_length)
    try:
        cluster, precision, plausible = _cluster(options)
        workload = Workload(
            num_params=found.num_params, dimensions=found.dimensions,
            seq_length=options.seq_length or found.default_seq_length(),
            micro_batch=options.micro_batch, global_batch=options.global_batch, precision=precision,
            bucket_size=options.bucket_size, checkpointing=options.activation_checkpointing,
            gradient_reduction=options.gradient_reduction, lora_rank=options.lora, base_bits=options.base_bits or 16,
            moments=options.moments, loss_chunks=options.loss_chunks, allow_missing=not options.only_here,
        )  # fmt: skip
        if options.base_bits and not options.lora:
            raise ConfigError(
                f"--base-bits {options.base_bits} is for frozen weights. Add --lora RANK, or leave it out."
            )
        candidates = plan(workload, cluster, options.engine)
        best = candidates[0]
        if not best.fits:
            advice = remedies(workload, cluster, options.engine)
        elif best.layout.offload != "none":
            advice = faster_than_offload(workload, cluster, options.engine, best)
        else:
            advice = []
        fewer = fewer_gpus(workload, cluster, options.engine, best) if best.fits else None
        return Answer(
            workload=workload, cluster=cluster, engine=options.engine, gpu=options.gpu or "", plausible=plausible,
            model=found.name, random_init=found.random_init or options.random_init, source=found.source,
            candidates=candidates, here=_best_here(workload, cluster, options.engine, best),
            why=reasons(workload, cluster, best) if best.fits else [], advice=advice, fewer=fewer,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _best_here(workload: Workload, cluster: Cluster, engine: str, best: Candidate) -> Candidate | None:
    """Return the best layout that this course's engines can run, as with ``--only-here``; None if none fits."""
    if best.fits and not best.missing:
        return best
    if missing_for(workload, engine):
        return None
    here = plan(dataclasses.replace(workload, allow_missing=False), cluster, engine)[0]
    return here if here.fits else None


def _parse_size(text: str) -> float:
    """Parse a number of parameters such as ``7e9`` or ``7B``.

    Raises:
        argparse.ArgumentTypeError: the text is not such a number.
    """
    unit = {"m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower())
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of parameters; write one such as 7e9 or 7B"
        ) from None


def _cluster(options: argparse.Namespace) -> tuple[Cluster, str, tuple[str, ...]]:
    """Return the devices, the precision, and the names of values that are plausible, not measured."""
    if options.gpus is None:
        raise ConfigError("Write --gpus NUMBER: how many devices there are.")
    if options.gpu is None and options.gpu_memory is None:
        raise ConfigError(f"Write --gpu PRESET ({', '.join(GPUS)}), or --gpu-memory GB.")
    name = options.gpu or _DEFAULT_GPU
    preset = find_gpu(name)
    precision = options.precision or ("bf16" if "bf16" in preset.flops else "fp16")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}. Write one of: {', '.join(PRECISIONS)}.")
    stated = {
        "efficiency": (options.efficiency, 1), "intra_node_bandwidth": (options.bandwidth_within, 1e9),
        "inter_node_bandwidth": (options.bandwidth_between, 1e9), "host_link": (options.bandwidth_host, 1e9),
    }  # fmt: skip
    values = {field: getattr(preset, field) if own is None else own * unit for field, (own, unit) in stated.items()}
    flops = options.gpu_tflops * 1e12 if options.gpu_tflops else peak_flops(name, precision)
    memory = preset.memory if options.gpu_memory is None else options.gpu_memory * 1e9
    cluster = Cluster(
        gpus=options.gpus, gpu_memory=memory, gpu_flops=flops, memory_bandwidth=preset.memory_bandwidth,
        gpus_per_node=options.gpus_per_node or preset.gpus_per_node, host_memory=options.host_memory * 1e9,
        host_adam=options.host_adam * 1e9, overlap=options.overlap, headroom=options.headroom, **values,
    )  # fmt: skip
    return cluster, precision, tuple(field for field in preset.plausible if stated.get(field, (None, 0))[0] is None)


def _check_numbers(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} is {value}; write a finite number.")
        if isinstance(value, float) and value <= 0 and name not in ("overlap", "headroom"):
            raise ConfigError(f"{flag} is {value:g}; write a number above 0.")
        least = {"lora": 0, "seq_length": 2}.get(name, 1)
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ConfigError(f"{flag} is {value}; the smallest possible value is {least}.")


def _document(answer: Answer) -> dict[str, Any]:
    workload, best = answer.workload, answer.candidates[0]
    rows = [
        {
            **{key: value for key, value in dataclasses.asdict(c).items() if key != "layout"},
            **dataclasses.asdict(c.layout), "name": c.layout.name, "fits": c.fits, "seconds": c.seconds,
        }
        for c in answer.candidates
    ]  # fmt: skip
    document = {
        "units": "bytes per GPU (host: per node), bytes sent per GPU and step, seconds per step",
        "engine": answer.engine, "gpu": answer.gpu or None, "plausible": answer.plausible,
        "dimensions_from": answer.source, "workload": dataclasses.asdict(workload),
        "replicated_params": workload.dimensions.replicated_params(answer.engine),
        "backward_all_reduces": backward_all_reduces(workload.dimensions, answer.engine),
        "cluster": dataclasses.asdict(answer.cluster),
        "best": rows[0] if best.fits else None, "why": answer.why, "candidates": rows,
        "advice": [plan_text.in_one_line(remedy) for remedy in answer.advice],
        "fewer_gpus": plan_text.in_one_line(answer.fewer) if answer.fewer else None,
        "left_out": plan_text.LEFT_OUT, "run": None,
    }  # fmt: skip
    runs = answer.here
    if runs:
        config = plan_commands.deepspeed_config(workload, runs)
        settings = plan_commands.settings_of(workload, runs, answer.model, random_init=answer.random_init)
        line = plan_commands.train_line(answer.cluster, settings, with_file=config is not None)
        document["run"] = {"settings": settings, "deepspeed": config, "line": line}
    return document
