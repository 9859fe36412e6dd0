"""DeepSpeed's automatic tensor parallelism (AutoTP): how it split each parameter of a model.

AutoTP replaces linear layers with layers that hold a share of the weight. With x the input and t ranks::

    column: y = x [W_1 ... W_t]                each rank computes some outputs; backward sums dx over the ranks
    row:    y = [x_1 ... x_t] [W_1; ...; W_t]  each rank takes some inputs; forward sums y over the ranks

On every parameter of such a layer, AutoTP records how it was split, and this module reads those records.
"""

from __future__ import annotations

import re
from typing import Any

from deepspeed.module_inject.layers import LinearLayer
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from torch import Tensor, nn

from tutorial_lib.config import ConfigError
from tutorial_lib.engine.chunked_loss import LossSum
from tutorial_lib.engine.parameter_layout import ParameterLayout

_META = "ds_autotp_universal_checkpoint_meta"


def parameter_layouts(module: nn.Module) -> list[ParameterLayout]:
    """Return the layout of each parameter on the ranks of its tensor-parallel group, in the model's order."""
    found = []
    for name, parameter in module.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        after = tuple(getattr(parameter, "ds_shape", parameter.shape))
        meta = getattr(parameter, _META, None) or {}
        dim = None if meta.get("replicated") else meta.get("partition_dim")
        found.append(
            ParameterLayout(
                parameter=name,
                how="replicated" if dim is None else str(meta["partition_type"]),
                dim=dim,
                before=after if dim is None else tuple(meta["logical_shape"]),
                after=after,
                partitions=int(getattr(parameter, "ds_zero_partition_world_size", 1)),
                bytes=held.numel() * held.element_size(),
            )
        )
    return found


def check_layouts(found: list[ParameterLayout]) -> None:
    """Refuse a model with an unsplit projection: it would cost the memory and the work that splitting should save.

    Raises:
        ConfigError: names matrices of the model's blocks that are replicated.
    """
    unsplit = [
        layout.parameter
        for layout in found
        if layout.how == "replicated" and len(layout.before) > 1 and re.search(r"\.\d+\.", layout.parameter)
    ]
    if unsplit:
        raise ConfigError(
            f"AutoTP left {len(unsplit)} projections unsplit on every rank, e.g. {unsplit[0]}. Check the plan that it "
            "follows: tensor_parallel.partition_config of the DeepSpeed file, or the model's own."
        )


def split_loss_sum(model: Any) -> LossSum | None:
    """Return the function that sums up a model's losses if its output layer is column-parallel, None otherwise."""
    return _loss_sum if isinstance(model.get_output_embeddings(), LinearLayer) else None


def _loss_sum(layer: LinearLayer, hidden_NH: Tensor, targets_N: Tensor, chunk_size: int) -> Tensor:
    """Sum up the losses from this rank's share of the vocabulary. Collective.

    The ranks exchange three numbers per token (the largest logit, the sum of exponentials and the target's logit)
    instead of gathering the logits. In backward they sum the gradient of the hidden states.
    """
    loss: Tensor = vocab_parallel_linear_cross_entropy(
        hidden_NH,
        layer.weight,
        targets_N,
        bias=layer.bias,
        tp_group=layer.mp_group,
        reduction="sum",
        chunk_size=chunk_size,
    )
    return loss
