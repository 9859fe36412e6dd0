"""Command ``train``: start or resume a training run."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any

from tutorial_lib.cli.options import (
    DONE,
    STOPPED,
    add_model_config,
    add_setting,
    given,
    reserve_stdout_for_json,
    shape_in_words,
)
from tutorial_lib.config import PROFILES, Config, EngineConfig, settings
from tutorial_lib.config.workshop import SUBSET
from tutorial_lib.tables import align


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option for a profile, and one for every setting."""
    parser.add_argument(
        "--profile",
        default="cpu",
        help=f"where it runs: {', '.join(PROFILES)}; the defaults below are those of cpu (default: cpu)",
    )
    for setting in settings().values():
        add_setting(parser, setting)
    add_model_config(parser)


def main(options: argparse.Namespace) -> int:
    """Start or resume a training run, print its summary, and return the exit code."""
    config = Config.create(options.profile, **given(options))

    from tutorial_lib import launch
    from tutorial_lib.engine.deepspeed.config import apply_file
    from tutorial_lib.lab.progress import progress
    from tutorial_lib.launch.environment import check_environment, is_under_torchrun, joined_rank

    check_environment(config.run, config.parallel)
    apply_file(config)  # refuses a wrong file before anything starts or is printed
    launch.warm_up(config)
    leader = joined_rank(config.run, config.parallel) in (None, 0)
    shown = progress(config.run.stop_after or config.run.steps) if leader and not options.json else None
    if shown and config.parallel.tp > 1:
        from tutorial_lib.mpu import Topology

        print(Topology(config.parallel.dp, config.parallel.tp, rank=0).drawing(), file=sys.stderr)
    with shown or nullcontext(), reserve_stdout_for_json(options.json):
        try:
            run = launch.run(config, on_rows=shown.on_rows if shown else None)
        except launch.Interrupted as interrupted:
            if not interrupted.runs:
                print(interrupted, file=sys.stderr)
                return STOPPED
            run = interrupted.runs[0]
    if leader:
        print(json.dumps(run.result) if options.json else summary(run))
    if run.result["status"] != "stopped":
        return DONE
    # torchrun treats any other exit code as a failed worker; result.json says that the run is not finished.
    return DONE if is_under_torchrun(config.run, config.parallel) else STOPPED


def summary(run: Any) -> str:
    """Summarise a run's result as a table."""
    result = run.result
    loss = {name: f"{result[name]:.4f}" for name in ("train_loss", "eval_loss_before", "eval_loss") if result[name]}
    rows = {
        "run": str(run.config.directory),
        "engine": _engine(run.config),
        "status": f"{result['status']} at step {result['step']} of {result['num_steps']}"
        + (f", resumed from {result['resumed_from']}" if result["resumed_from"] is not None else "")
        + (f" of {shape_in_words(result['reshaped_from'])}; random numbers reseeded" if result["reshaped_from"] else "")
        + (_what_follows(run.config.engine) if result["status"] == "stopped" else ""),
        **{f"left out{' ' * n}": f"{o['checkpoint']}: {o['why']}" for n, o in enumerate(result["left_out"])},
        **{f"restart {n}": _restart(r) for n, r in enumerate(result["restarts"], 1)},
        **{f"{use} rows": said for use, split in result["data"].items() if (said := _rows(use, split, run.config))},
        **{name.replace("_", " "): value for name, value in loss.items()},
        **({"eval answers": _answers(result["eval_answers"])} if "eval_answers" in result else {}),
        **({"eval loss by epoch": _by_epoch(result["eval_losses"])} if result["eval_losses"] else {}),
        "tokens per second": f"{result['tokens_per_second']:.0f}" if result["tokens_per_second"] else "too few steps",
        "peak memory": ", ".join(f"{rank['peak_memory_bytes'] / 2**20:.0f} MiB" for rank in result["ranks"]),
        "checkpoint": result["checkpoint"],
    }
    pairs = [(name, str(value)) for name, value in rows.items()]
    return "\n".join(align(pairs, (False, False), least=(18, 0), gaps=(" ",)))


def _what_follows(engine: EngineConfig) -> str:
    if engine.shard_at_load:
        return "; its weights are saved, and it cannot be resumed"
    return "; run the same command again to continue"


def _engine(config: Config) -> str:
    """Describe the engine, with the values of a DeepSpeed file: ``deepspeed, zero_stage=2, offload=none, fp32``."""
    by_engine: dict[str, tuple[str, ...]] = {"deepspeed": ("zero_stage", "offload"), "fsdp": ("sharding", "offload")}
    shown = by_engine.get(config.engine.name, ())
    if config.engine.name == "trainer" and config.engine.deepspeed_file:
        shown = by_engine["deepspeed"]
    if config.engine.shard_at_load:
        shown = ("shard_at_load",)
    flat = config.flat()
    return ", ".join([config.engine.name, *(f"{name}={flat[name]}" for name in shown), config.engine.precision])


def _by_epoch(losses: list[dict[str, Any]]) -> str:
    def more(each: dict[str, Any]) -> str:
        scores = [f"{each['all_tokens']:.4f} over all tokens"] if "all_tokens" in each else []
        scores += [f"exact match {each['exact_match']:.1f} %, F1 {each['f1']:.1f} %"] if "f1" in each else []
        return f" ({'; '.join(scores)})" if scores else ""

    return ", ".join(f"{each['epoch']:g}: {each['loss']:.4f}{more(each)}" for each in losses)


def _answers(answers: dict[str, Any]) -> str:
    cut = f", {answers['num_cut']} of them without the end of their context" if answers["num_cut"] else ""
    return (
        f"exact match {answers['exact_match']:.1f} %, F1 {answers['f1']:.1f} % on {answers['num_questions']} "
        f"questions{cut}"
    )


def _rows(use: str, split: dict[str, Any], config: Config) -> str:
    """Describe the default subset and any rows left out or cut; return an empty string if there is nothing to say."""
    flag = {"train": "max_examples", "eval": "max_eval_examples"}[use]
    said = []
    is_default = config.engine.name == "trainer" and flag not in config.given
    if is_default and config.flat()[flag] == SUBSET[flag] == split["num_rows"]:
        said.append(f"the first {SUBSET[flag]}; for all, write --{flag.replace('_', '-')} all")
    return ". ".join([*said, _odd_rows(split)] if _odd_rows(split) else said)


def _odd_rows(split: dict[str, Any]) -> str:
    """Say how many rows of a split were left out, cut, or also trained on; return an empty string if none were."""
    odd = {
        "left out (blank, or no room for the answer)": split["num_left_out"],
        "cut at seq_length": split["num_cut"],
        "also trained on": split.get("num_trained_on", 0),
    }
    said = ", ".join(f"{number} {what}" for what, number in odd.items() if number)
    return f"{said}, of {split['num_rows']}" if said else ""


def _restart(restart: dict[str, Any]) -> str:
    failed, when = restart["failed"], datetime.fromtimestamp(restart["time"], UTC).strftime("%H:%M:%S UTC")
    return f"from step {restart['from_step']} at {when}, after rank {failed['rank']} failed: {failed['message'][:200]}"
