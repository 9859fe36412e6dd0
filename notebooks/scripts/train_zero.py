"""The training loop of this course in one file: ZeRO on several processes, started by torchrun or by Ray Train.

    torchrun --standalone --nproc-per-node 2 notebooks/scripts/train_zero.py
    python notebooks/scripts/train_zero.py ray

Stop it at any time and start it again: it resumes from its newest checkpoint, with either launcher. So does
`python -m tutorial_lib train` with the same settings, which adds evaluation, metrics files and stop requests.
"""

import sys
from pathlib import Path

from tutorial_lib.checkpoint import CheckpointManager
from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_train_loader
from tutorial_lib.engine import build_engine
from tutorial_lib.launch import preflight
from tutorial_lib.launch.ray.report import report
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import count_tokens, sum_over_ranks, token_loss_sum

SETTINGS = {"name": "train-zero", "zero_stage": 2, "dp": 2, "steps": 20, "checkpoint_every": 10}


def train_loop(settings):
    """Train one run as one rank, from its newest checkpoint to its end; return the loss of each step."""
    config = Config.from_json(settings["config"])
    topology = Topology.from_environment(config.parallel)  # which rank this is, and who shares its layers
    tokenizer = load_tokenizer(config.model.name)
    loader = build_train_loader(config, tokenizer, topology)
    engine = build_engine(config, topology, loader.num_steps)  # model, AdamW, learning-rate schedule
    checkpoints = CheckpointManager(config, engine, loader, topology)

    losses = []
    for step, micro_batches in loader.steps(start=checkpoints.restore()):
        tokens = count_tokens(micro_batches, topology)  # over all ranks, so that every token counts the same
        loss_sum = 0.0
        for batch in micro_batches:
            batch_sum = token_loss_sum(engine.forward(batch), batch["labels"])
            engine.backward(batch_sum / tokens)
            loss_sum += batch_sum.item()
        engine.step()  # clip, update, advance the learning rate
        losses.append(sum_over_ranks(loss_sum, topology) / tokens)
        if topology.rank == 0:
            print(f"step {step:4}  loss {losses[-1]:.7f}", flush=True)
        report({"step": step, "loss": losses[-1]}, checkpoint=checkpoints.save_if_due(step))

    checkpoints.close()
    engine.close()
    return losses


def train_on_ray(config):
    """Run the loop on Ray Train, which starts the ranks as its workers."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpus = config.run.device == "cuda"
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config.to_json()},
        scaling_config=ScalingConfig(num_workers=config.parallel.world_size, use_gpu=on_gpus),
        run_config=RunConfig(name=config.run.name, storage_path=config.run.storage),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo"),  # NCCL carries GPU tensors
    )
    return trainer.fit()


def main(config):
    """Check the configuration, then train with the launcher that it names."""
    config = preflight(config)
    if config.run.launcher == "ray":
        return train_on_ray(config).return_value
    from tutorial_lib.launch.torchrun import process_group

    with process_group(config.run, "env://"):
        return train_loop({"config": config.to_json()})


if __name__ == "__main__":
    given = sys.argv[1:]
    if given and given != ["ray"]:
        main(Config.from_json(Path(given[0]).read_text()))
    else:
        main(Config.create("cpu", launcher="ray" if given else "none", **SETTINGS))
