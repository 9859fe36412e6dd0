"""What DeepSpeed's automatic tensor parallelism (AutoTP) has made of a model, and how to make it whole again.

AutoTP replaces linear layers by ones that hold a share of the weight. With x the input and t ranks::

    column: y = x [W_1 ... W_t]             each rank computes some outputs; backward sums dx over the ranks
    row:    y = [x_1 ... x_t] [W_1; ...; W_t]  each rank takes some inputs; forward sums y over the ranks

It notes on every parameter of such a layer how it was split. This module reads these notes, and the files of DeepSpeed
checkpoints. It imports no DeepSpeed.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutorial_lib.config import ConfigError
from tutorial_lib.measure.layout import ParameterLayout

_NOTES = "ds_autotp_universal_checkpoint_meta"


def layouts(module: nn.Module) -> list[ParameterLayout]:
    """How each parameter lies on the ranks of its tensor-parallel group, in the model's order."""
    found = []
    for name, parameter in module.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        after = tuple(getattr(parameter, "ds_shape", parameter.shape))
        notes = getattr(parameter, _NOTES, None) or {}
        dim = None if notes.get("replicated") else notes.get("partition_dim")
        found.append(
            ParameterLayout(
                parameter=name,
                how="replicated" if dim is None else str(notes["partition_type"]),
                dim=dim,
                before=after if dim is None else tuple(notes["logical_shape"]),
                after=after,
                partitions=int(getattr(parameter, "ds_zero_partition_world_size", 1)),
                bytes=held.numel() * held.element_size(),
            )
        )
    return found


def check_layouts(found: list[ParameterLayout]) -> None:
    """Refuse a model of which a projection stayed whole: it costs the memory and the work that splitting was to save.

    Raises:
        ConfigError: names matrices of the model's blocks that are replicated.
    """
    whole = [
        layout.parameter
        for layout in found
        if layout.how == "replicated" and len(layout.before) > 1 and re.search(r"\.\d+\.", layout.parameter)
    ]
    if whole:
        raise ConfigError(
            f"AutoTP left {len(whole)} projections whole on every rank, {whole[0]} first. Look at the plan that it "
            "follows: tensor_parallel.partition_config of the DeepSpeed file, or the model's own."
        )


def gathered(share: Tensor, dim: int | None, group: Any) -> Tensor:
    """The whole of a tensor of which each rank of ``group`` holds an equal share along ``dim``. Collective."""
    if dim is None:
        return share
    shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, share.contiguous(), group=group)
    return torch.cat(shares, dim)


def joined(shares: list[dict[str, Tensor]], rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Whole weights by name, of the shares of all tensor-parallel ranks.

    Args:
        shares: by tensor-parallel rank, its weights by name.
        rows: layouts as :meth:`ParameterLayout.to_dict` gives them. A name without one, as a tied weight's second
            name, is that of a replicated parameter.
    """
    dims = {row["parameter"]: row["dim"] for row in rows}
    return {
        name: first if dims.get(name) is None else torch.cat([share[name] for share in shares], dims[name])
        for name, first in shares[0].items()
    }


@contextmanager
def as_if_alone(directory: Path, tp_rank: int) -> Iterator[Path]:
    """A directory in which one tensor-parallel rank's files have the names that they have without others.

    Args:
        directory: holds ``engine/``, which DeepSpeed has written at stage 0, 1 or 2.
    """
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "engine").mkdir()
        for path in (directory / "engine").glob(f"*mp_rank_{tp_rank:02d}_*.pt"):
            name = path.name.replace(f"mp_rank_{tp_rank:02d}_", "mp_rank_00_")
            (Path(alone) / "engine" / name).symlink_to(path.resolve())
        yield Path(alone)


def merged_stage_3(directory: Path, rows: list[dict[str, Any]], dp: int, tp: int) -> dict[str, Tensor]:
    """Whole fp32 weights by name, of a stage 3 checkpoint.

    DeepSpeed partitions what AutoTP has split over the data-parallel ranks, and all else, as it was when the model was
    built, over all ranks. Its own merge (``zero_to_fp32``) knows one number of ranks alone.

    Args:
        directory: holds ``engine/``, which DeepSpeed has written.
        rows: layouts as :meth:`ParameterLayout.to_dict` gives them.
        dp: data-parallel size of the run.
        tp: its tensor-parallel size.
    """
    ranks = [(dp_rank, tp_rank) for dp_rank in range(dp) for tp_rank in range(tp)]
    models, flat = {}, {}
    for dp_rank, tp_rank in ranks:
        name = f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_"
        models[dp_rank, tp_rank] = _load(directory / "engine" / f"{name}model_states.pt")
        optimizer = _load(next((directory / "engine").glob(f"*{name}optim_states.pt")))["optimizer_state_dict"]
        flat[dp_rank, tp_rank] = torch.cat([group.flatten() for group in optimizer["fp32_flat_groups"]])
    layout = {row["parameter"]: row for row in rows}
    weights: dict[str, Tensor] = {}
    offset = 0
    for name in (name for group in models[0, 0]["param_shapes"] for name in group):
        size = -(-math.prod(layout[name]["after"]) // layout[name]["partitions"])
        weights[name] = _merged(layout[name], {rank: flat[rank][offset : offset + size] for rank in ranks}, dp, tp)
        offset += size
    for name in models[0, 0]["frozen_param_fragments"] or {}:
        frozen = {rank: models[rank]["frozen_param_fragments"][name].float() for rank in ranks}
        weights[name] = _merged(layout[name], frozen, dp, tp)
    return weights


def _merged(row: dict[str, Any], pieces: dict[tuple[int, int], Tensor], dp: int, tp: int) -> Tensor:
    """One parameter, of the piece that each rank (data-parallel, tensor-parallel) holds."""

    def share(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)[: math.prod(row["after"])].view(row["after"])

    if row["partitions"] == dp * tp:
        return share(list(pieces.values()))
    shares = [share([pieces[dp_rank, tp_rank] for dp_rank in range(dp)]) for tp_rank in range(tp)]
    return shares[0] if row["dim"] is None else torch.cat(shares, row["dim"])


def _load(path: Path) -> Any:
    # DeepSpeed's own files hold more than tensors; the caller has verified them.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
