"""Original ZeRO workshop: the rows that it trains on, and the names of its experiments.

``2ZO-1G1N`` is ZeRO stage 2 with offload, on 1 GPU of 1 node. The digit before ``Z`` is the ZeRO stage. ``O``
stands for offload, and ``OP`` for offload to pinned memory. Then come the total number of GPUs and the number of nodes:
``3Z-8G4N`` has 8 GPUs, 2 on each of 4 nodes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tutorial_lib.config.fields import ConfigError

SUBSET = {"max_examples": 500, "max_eval_examples": 50}
"""Number of rows, from the start of SQuAD, that the workshop trains and evaluates on, by the setting's flat name."""

_NAME = re.compile(r"([0-3])Z(OP|O)?-([1-9]\d*)G([1-9]\d*)N")


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment of the workshop, as its name describes it."""

    zero_stage: int
    offload: str
    """``none``, ``optimizer``, or at stage 3 ``all``, which moves the parameters as well."""
    pin_memory: bool
    gpus: int
    """GPUs in total, over all nodes."""
    nodes: int

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings by flat name, except those that depend on the number of GPUs."""
        return {"zero_stage": self.zero_stage, "offload": self.offload, "pin_memory": self.pin_memory}


def looks_like_experiment(name: str) -> bool:
    """Return whether a name looks like one of the workshop's; :func:`parse_experiment` may still refuse it."""
    return _NAME.fullmatch(name) is not None


def parse_experiment(name: str) -> Experiment:
    """Parse a workshop name into the experiment that it describes.

    Raises:
        ConfigError: the name does not parse, its nodes cannot share the GPUs evenly, or its stage has nothing to
            offload.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigError(
            f"{name!r} is not an experiment of the workshop. Write a name such as 2ZO-1G1N: ZeRO stage 2, with offload "
            "(leave out the O for none), 1 GPU in total, 1 node."
        )
    stage, gpus, nodes = int(match[1]), int(match[3]), int(match[4])
    if gpus % nodes:
        near = gpus - gpus % nodes or nodes
        raise ConfigError(f"{name}: {nodes} nodes cannot share {gpus} GPUs evenly. Write {near}G{nodes}N or {gpus}G1N.")
    if match[2] and stage == 0:
        raise ConfigError(f"{name}: ZeRO stage 0 has nothing to offload. Write 0Z-{gpus}G{nodes}N, or stage 1, 2 or 3.")
    offload = "none" if not match[2] else "all" if stage == 3 else "optimizer"
    return Experiment(stage, offload, match[2] == "OP", gpus, nodes)
