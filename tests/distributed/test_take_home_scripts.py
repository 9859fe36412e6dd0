"""Take-home scripts on several ranks, compared with plain PyTorch in this process.

Each training script is started once by torchrun, and once on forked ranks, which start faster.
"""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorial_lib.dataloader import load_rows
from tutorial_lib.lab.ranks import script_on_ranks
from tutorial_lib.lab.scripts import hangs, torchrun, train_2d, train_fsdp
from tutorial_lib.models.loading import resolve_model

SIZES = ["--global-batch", 4, "--seq-length", 32]


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Return options that name a model and a text. Qwen2's rotary frequencies are buffers that no file stores."""
    corpus = tmp_path_factory.mktemp("text") / "corpus.txt"
    corpus.write_text("\n".join(load_rows("embedded/news", "train", max_examples=100)["text"]))
    return ["--model", resolve_model("embedded/qwen2"), "--text", corpus]


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[3]) for line in lines]


def train_plainly(model_and_text: list[object], num_steps: int) -> list[float]:
    """Train in this process, on the rows that the scripts read with these sizes."""
    _, path, _, corpus = model_and_text
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rows = train_fsdp.read_rows(corpus, AutoTokenizer.from_pretrained(path), 32)
    found = []
    for tokens in rows[: 4 * num_steps].split(4):
        loss = cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_fsdp_on_two_ranks_and_then_on_one_is_plain_pytorch(tmp_path: Path, model_and_text: list[object]) -> None:
    """Lesson 03 does the same with tied GPT-2."""
    flags = [*model_and_text, *SIZES, "--directory", tmp_path / "run"]
    first = losses(torchrun(train_fsdp, 2, *flags, "--steps", 2))
    second = losses(script_on_ranks(1, train_fsdp, *flags, "--steps", 3))
    assert first + second == pytest.approx(train_plainly(model_and_text, 3), rel=1e-6)


def test_a_grid_of_four_and_then_two_tensor_parallel_ranks_are_plain_pytorch(
    tmp_path: Path, model_and_text: list[object]
) -> None:
    """The last of three steps after the resume would show moments that were not restored."""
    flags = [*model_and_text, *SIZES, "--directory", tmp_path / "run"]
    first = losses(script_on_ranks(4, train_2d, *flags, "--tp", 2, "--steps", 2))
    second = losses(torchrun(train_2d, 2, *flags, "--tp", 2, "--steps", 5))
    assert (len(first), len(second)) == (2, 3)
    assert first + second == pytest.approx(train_plainly(model_and_text, 5), rel=1e-6)


def test_a_script_that_fails_shows_its_own_error() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)hangs failed on 1 ranks:.*KeyError: 'nothing_like_it'"):
        torchrun(hangs, 1, "nothing_like_it")
