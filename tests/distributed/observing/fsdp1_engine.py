"""Engine of FSDP1, PyTorch's class ``FullyShardedDataParallel``, for comparison with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.config import Config
from tutorial_lib.engine.fsdp.sharding import layers_of
from tutorial_lib.engine.single import TorchEngine
from tutorial_lib.mpu import Topology


class FSDP1Engine(TorchEngine):
    """FSDP1 with a unit per layer. ``sharding`` is FSDP1's own name in lower case. Checkpoints are empty."""

    def __init__(self, config: Config, topology: Topology, device: torch.device) -> None:
        super().__init__(config, topology, device)
        self.averages_over = topology.dp
        strategy = ShardingStrategy[config.engine.sharding.upper()]
        self.module: FullyShardedDataParallel = FullyShardedDataParallel(
            self.module, sharding_strategy=strategy, use_orig_params=True, device_id=device,
            auto_wrap_policy=ModuleWrapPolicy({type(layers_of(self.module)[0])}),
        )  # fmt: skip
        # In a group of one rank, FSDP1 would have changed the strategy to NO_SHARD.
        assert self.module.sharding_strategy is strategy
        options = {key: self.optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer = torch.optim.AdamW(self.module.parameters(), **options)

    def step(self) -> float:
        limit = self.config.optimizer.gradient_clipping
        norm = float(self.module.clip_grad_norm_(limit if limit > 0 else float("inf")))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return norm

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        with FullyShardedDataParallel.summon_full_params(self.module, writeback=False):
            yield from list(super().full_parameters())

    def full_optimizer_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        full = get_optimizer_state_dict(self.module, self.optimizer, options=StateDictOptions(full_state_dict=True))
        for name, state in full["state"].items():
            yield name, {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}

    def save(self, directory: Path, writer: Writer) -> None:
        directory.mkdir(parents=True, exist_ok=True)
