"""Chunked loss under tensor parallelism, with the loss and gradients of one process but no full logits in memory."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.workers.first_step import ROWS, TOKENS
from tests.support.models import MODELS, without_weights
from tutorial_lib import launch
from tutorial_lib.config import Config

VOCABULARY = 20_000
LOGITS = 4 * ROWS * (TOKENS - 1) * VOCABULARY
"""Bytes of a micro-batch's logits in fp32."""

ENGINES = {
    "FSDP2": {"engine": "fsdp"},
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
}
MODELS_OF = {"FSDP2": ("tied", "own"), "ZeRO-1": ("tied", "own", "bloom"), "ZeRO-3": ("tied", "own")}
"""Models of each engine. AutoTP splits a separate output layer, and keeps one tied to the embedding in full."""

CASES = [(engine, model) for engine, models in MODELS_OF.items() for model in models]


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory):
    """Train each case on two ranks, and each model on one, and return the loss, gradients and peak of each."""
    directory = tmp_path_factory.mktemp("split-loss")
    sizes = {"vocab_size": VOCABULARY}
    without_weights("qwen2", directory / "tied", **(MODELS["qwen2"] | sizes))
    without_weights("qwen2", directory / "own", **(MODELS["qwen2"] | sizes), tie_word_embeddings=False)
    without_weights("bloom", directory / "bloom", **(MODELS["bloom"] | sizes))

    def config(name, model, **flat):
        shared = {"random_init": True, "launcher": "local", "gradient_clipping": 0.0, "warmup_steps": 0}
        return Config.create(
            "cpu", name=name, storage=str(directory / "runs"), model=str(directory / model), **shared, **flat
        )

    alone = {model: config(f"alone-{model}", model, engine="torch", dp=1) for model in ("tied", "own", "bloom")}
    runs = {(engine, model, 16): ENGINES[engine] for engine, model in CASES} | {
        ("ZeRO-1", "own", 1): ENGINES["ZeRO-1"],
        ("bf16", "own", 1): ENGINES["ZeRO-1"] | {"precision": "bf16"},
        ("bf16", "own", 16): ENGINES["ZeRO-1"] | {"precision": "bf16"},
    }
    split = {
        (engine, model, chunks): config(f"{engine}-{model}-{chunks}", model, dp=1, tp=2, loss_chunks=chunks, **flat)
        for (engine, model, chunks), flat in runs.items()
    }
    for configs in (alone, split):
        launch.run_all(list(configs.values()), worker="tests.distributed.workers.first_step")
    return {name: torch.load(each.directory / "first-step.pt") for name, each in (alone | split).items()}


@pytest.mark.parametrize(("engine", "model"), CASES)
def test_loss_and_gradients_match_one_process(first_steps, engine, model):
    chunked, alone = first_steps[engine, model, 16], first_steps[model]
    assert chunked["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert chunked["gradients"].keys() == alone["gradients"].keys()
    for name, expected in alone["gradients"].items():
        difference = (chunked["gradients"][name] - expected).abs().max()
        assert difference <= 1e-6 * max(1.0, float(expected.abs().max())), name


def test_in_bf16_the_loss_differs_by_what_bf16_rounds(first_steps):
    assert first_steps["bf16", "own", 16]["loss"] == pytest.approx(first_steps["bf16", "own", 1]["loss"], rel=2e-3)


@pytest.mark.parametrize(("engine", "model"), CASES)
def test_the_peak_does_not_contain_the_logits(first_steps, record_property, engine, model):
    """In chunks, the largest tensors have the size of the output layer's weight."""
    peak = first_steps[engine, model, 16]["peak"]
    record_property("peak_mib", round(peak / 2**20, 1))
    assert peak < LOGITS / 2


def test_without_chunks_every_rank_holds_the_logits_and_their_gradient(first_steps, record_property):
    peak = first_steps["ZeRO-1", "own", 1]["peak"]
    record_property("peak_mib", round(peak / 2**20, 1))
    assert peak > 2 * LOGITS
