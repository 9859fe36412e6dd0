"""Comparison of two runs, which equivalence tests must pass and deliberately broken runs must fail.

The tolerances, for fp32 by default, are:

- losses and gradient norms: ``|a - b| <= tolerance * max(1, |b|)``;
- parameters: the same bound for each element;
- moments: the same bound and, because they are small, also ``max |a - b| <= moments * max |b|`` per tensor.

Tokens per step, learning rates, epochs, and the examples of every step must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.distributed.cases.small_runs import STEPS
from tests.distributed.observing.probe import OBSERVATION
from tutorial_lib.config import Config
from tutorial_lib.records import Row, RunDirectory

STAGE_0_IN_BF16 = {"tolerance": 2e-3, "grad_norm": 2e-3, "parameters": 4e-3, "moments": 0.1}
"""Tolerances without ZeRO, where gradients are added up in different groupings, and each sum is rounded to bf16."""


@dataclass(frozen=True)
class Observed:
    """A finished run: its records, and the observations of :mod:`tests.distributed.workers.observing`."""

    config: Config
    rows: list[Row]
    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    examples: list[list[str]]
    tokens_by_rank: list[list[int]]
    ranks_agree: bool
    files_by_rank: list[list[str]]
    evaluation: dict[str, int] | None = None
    load_of_nothing: str | None = None

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.config.directory)

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Every rank's measurements of its third step."""
        return [rank["measured"] for rank in self.directory.result()["ranks"]]

    @classmethod
    def read(cls, config: Config) -> Observed:
        seen = torch.load(config.directory / OBSERVATION, weights_only=True)
        return cls(config=config, rows=RunDirectory(config.directory).rows(), **seen)


@dataclass
class Differences:
    """The largest differences by kind, and those that exceed their tolerance."""

    largest: dict[str, float] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)

    def number(self, kind: str, where: str, size: float, tolerance: float) -> None:
        self.largest[kind] = max(self.largest.get(kind, 0.0), size)
        if not size <= tolerance:
            self.found.setdefault(kind, f"{kind} differs by {size:.3g} at {where} (allowed: {tolerance:g})")

    def exact(self, kind: str, where: str, one: Any, other: Any) -> None:
        if one != other:
            self.found.setdefault(kind, f"{kind} differs at {where}: {one!r:.80}, {other!r:.80}")


def compare(
    run: Observed,
    reference: Observed,
    *,
    tolerance: float = 1e-6,
    moments: float = 2e-5,
    grad_norm: float | None = None,
    parameters: float | None = None,
) -> Differences:
    """Collect all differences between a run and its reference; the module's docstring defines the tolerances."""
    grad_norm = tolerance if grad_norm is None else grad_norm
    parameters = tolerance if parameters is None else parameters
    differences = Differences()
    differences.exact("steps", "the end", [r["step"] for r in run.rows], [r["step"] for r in reference.rows])
    for row, expected in zip(run.rows, reference.rows, strict=False):
        where = f"step {row['step']}"
        for kind in ("tokens", "lr", "epoch"):
            differences.exact(kind, where, row[kind], expected[kind])
        for kind, allowed in (("loss", tolerance), ("grad_norm", grad_norm)):
            size = abs(row[kind] - expected[kind]) / max(1.0, abs(expected[kind]))
            differences.number(kind, where, size, allowed)
    # A resumed run has trained only the last steps.
    seen = len(run.examples)
    for step, (examples, expected) in enumerate(zip(run.examples, reference.examples[-seen:], strict=True), 1):
        differences.exact("examples", f"step {len(reference.examples) - seen + step}", examples, expected)
    differences.exact("names", "parameters", list(run.parameters), list(reference.parameters))
    differences.exact("names", "moments", sorted(run.moments), sorted(reference.moments))
    differences.exact("ranks_agree", "the end", run.ranks_agree, True)
    for name, expected in reference.parameters.items():
        differences.number("parameters", name, _largest(run.parameters[name], expected), parameters)
    for name, both in reference.moments.items():
        for kind, expected in both.items():
            moment = run.moments[name][kind]
            differences.number(f"{kind} absolutely", name, _largest(moment, expected), tolerance)
            scale = expected.abs().max().item() or 1.0
            differences.number(kind, name, (moment - expected).abs().max().item() / scale, moments)
    return differences


def allowed(config: Config) -> dict[str, float]:
    """Return the tolerances for a run in fp32 against its reference; ``test_equivalence.py`` explains them."""
    if config.optimizer.eps < 1e-6:
        return {"parameters": STEPS * config.optimizer.learning_rate, "moments": 1e-4}
    if config.engine.name == "fsdp":
        return {}
    if config.engine.offload != "none":
        return {"grad_norm": 1e-5, "moments": 1e-4}
    return {"moments": 1e-4} if config.engine.zero_stage == 0 and config.optimizer.gradient_clipping > 0 else {}


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).abs() / other.abs().clamp(min=1)).max())


def assert_equal(run: Observed, reference: Observed, **tolerances: float) -> Differences:
    """Raise unless a run equals its reference within the tolerances."""
    differences = compare(run, reference, **tolerances)
    if differences.found:
        raise AssertionError(
            f"{run.config.run.name} differs from {reference.config.run.name}:\n  "
            + "\n  ".join(differences.found.values())
        )
    return differences


def assert_identical(run: Observed, reference: Observed) -> None:
    """Raise unless two runs are the same bit for bit."""
    assert_equal(run, reference, tolerance=0.0, moments=0.0)
