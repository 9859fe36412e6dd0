"""Take-home scripts under torchrun, against plain PyTorch in this process."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorial_lib.dataloader import load_rows
from tutorial_lib.lab.scripts import hangs, torchrun, train_fsdp
from tutorial_lib.models.loading import resolve_model


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[3]) for line in lines]


def test_fsdp_on_two_ranks_and_then_on_one_is_plain_pytorch(tmp_path: Path) -> None:
    """Qwen2 has rotary frequencies, which are buffers that no file stores; lesson 03 uses the tied GPT-2."""
    path, corpus = resolve_model("embedded/qwen2"), tmp_path / "corpus.txt"
    corpus.write_text("\n".join(load_rows("embedded/news", "train", max_examples=100)["text"]))
    flags = [
        "--model",
        path,
        "--text",
        corpus,
        "--directory",
        tmp_path / "run",
        "--global-batch",
        4,
        "--seq-length",
        32,
    ]
    sharded = losses(torchrun(train_fsdp, 2, *flags, "--steps", 2)) + losses(
        torchrun(train_fsdp, 1, *flags, "--steps", 3)
    )

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rows = train_fsdp.read_rows(corpus, AutoTokenizer.from_pretrained(path), 32)
    plain = []
    for tokens in rows[:12].split(4):
        loss = cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plain.append(loss.item())
    assert sharded == pytest.approx(plain, rel=1e-6)


def test_a_script_that_fails_shows_its_own_error() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)hangs failed on 1 ranks:.*KeyError: 'nothing_like_it'"):
        torchrun(hangs, 1, "nothing_like_it")
