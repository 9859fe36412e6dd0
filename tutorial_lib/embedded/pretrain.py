"""Pretraining of the embedded models: a byte-level BPE vocabulary, three tiny models, and one bare configuration.

``python -m tutorial_lib.embedded.pretrain`` (``make embedded``) replaces the committed files. All training is seeded,
and uses the text that this package ships.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.embedded.corpora import rows

VOCAB_SIZE = 2048
"""Divisible by 4, so that 2 or 4 tensor-parallel ranks can split the vocabulary evenly."""

SEED = 0
HIDDEN, LAYERS, HEADS, LENGTH = 96, 4, 8, 512
STEPS, PEAK_LEARNING_RATE, WARMUP = 1500, 6e-3, 100
INITIALIZER_RANGE = 0.06
"""The original 0.02 suits hidden sizes ten times as large; here it makes the loss 0.2 higher after 500 steps."""

SHAPES = ((8, 128), (8, 128), (8, 128), (2, 512))
"""Rows and columns of successive batches: mostly short rows, which are cheap, and long ones to train all positions."""

SAMPLE = (
    "A function that reads a file returns its text. If the file does not exist, the function raises an error, and "
    "the program that called it should say which name was wrong. The default value of an argument is used when the "
    "caller gives none."
)
"""Text written for this course: the loss on it identifies the weights."""


def build_tokenizers(merged: Tokenizer) -> dict[str, PreTrainedTokenizerBase]:
    """Return three families' tokenizers over one vocabulary, with each family's special tokens and word boundaries."""
    state = json.loads(merged.to_str())["model"]
    vocab: dict[str, int] = state["vocab"]
    merges = [tuple(pair) for pair in state["merges"]]
    by_id = sorted(vocab, key=vocab.__getitem__)

    def with_specials(first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> dict[str, Any]:
        # A shorter vocabulary is a prefix of the longer one: BPE adds one token per merge.
        room = VOCAB_SIZE - len(first) - len(last)
        names = [*first, *by_id[:room], *last]
        return {"vocab": {name: n for n, name in enumerate(names)}, "merges": merges[: room - 256]}

    gpt2 = GPT2Tokenizer(**with_specials(last=("<|endoftext|>",)), model_max_length=LENGTH)
    qwen2 = Qwen2Tokenizer(
        **with_specials(last=("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    bloom_specials = ("<unk>", "<s>", "</s>", "<pad>")
    inner = Tokenizer(models.BPE(**with_specials(first=bloom_specials)))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), behavior="isolated"),  # noqa: RUF001
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    unk, bos, eos, pad = bloom_specials
    bloom = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left"
    )
    return {"embedded/gpt2": gpt2, "embedded/qwen2": qwen2, "embedded/bloom": bloom}


def train_vocabulary() -> Tokenizer:
    """Train byte-level BPE on the training articles: 256 bytes, and merges up to the size of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator((row["text"] for row in rows("embedded/articles", "train")), trainer)
    return tokenizer


def configurations(tokenizers: dict[str, PreTrainedTokenizerBase]) -> dict[str, dict[str, Any]]:
    """Return the dimensions of the models and of GPT-2 small.

    Dropout is 0 everywhere, because the course compares runs on different numbers of ranks digit by digit, and
    two ranks draw different random numbers than one rank does. GPT-2's own default, 0.1, can be set in ``config.json``.
    The models' numbers of heads, hidden sizes and vocabulary size are divisible by 4, so that 2 or 4 tensor-parallel
    ranks share them evenly.
    """
    gpt2, qwen2, bloom = (tokenizers[name] for name in MODEL_NAMES)
    shared = {"vocab_size": VOCAB_SIZE, "initializer_range": INITIALIZER_RANGE}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2_ids = {"bos_token_id": gpt2.eos_token_id, "eos_token_id": gpt2.eos_token_id}
    return {
        "embedded/gpt2": dict(
            model_type="gpt2", **shared, n_positions=LENGTH, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
            **no_dropout, **gpt2_ids,
        ),
        "embedded/qwen2": dict(
            model_type="qwen2", **shared, hidden_size=HIDDEN, intermediate_size=320,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=4, max_position_embeddings=2048,
            tie_word_embeddings=True, bos_token_id=qwen2.eos_token_id, eos_token_id=qwen2.eos_token_id,
            pad_token_id=qwen2.pad_token_id,
        ),
        "embedded/bloom": dict(
            model_type="bloom", **shared, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS,
            hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=bloom.bos_token_id,
            eos_token_id=bloom.eos_token_id, pad_token_id=bloom.pad_token_id,
        ),
        "embedded/gpt2-small": dict(
            model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
            **no_dropout, **gpt2_ids,
        ),
    }  # fmt: skip


def token_stream(tokenizer: PreTrainedTokenizerBase, split: str) -> torch.Tensor:
    """Return the articles of one split, each ending with EOS, as a single row of token ids: shape [tokens], int64."""
    ids: list[int] = []
    for row in rows("embedded/articles", split):
        ids += [*tokenizer(row["text"], verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def unigram_entropy(train: torch.Tensor, evaluation: torch.Tensor) -> float:
    """Return the cross-entropy in nats per token of a model that only knows token frequencies (add-one smoothed)."""
    counts = torch.bincount(train, minlength=VOCAB_SIZE).double() + 1
    return float(-(counts / counts.sum()).log()[evaluation].mean())


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Return the mean next-token loss in nats per token, over consecutive windows of LENGTH tokens."""
    model.eval()
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    return float(torch.stack([model(input_ids=window, labels=window).loss for window in windows]).mean())


def batches(stream: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield random windows of a stream, the same ones on every run, each in one of SHAPES."""
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        num_rows, length = SHAPES[step % len(SHAPES)]
        starts = torch.randint(len(stream) - length, (num_rows,), generator=generator)
        yield torch.stack([stream[s : s + length] for s in starts.tolist()])


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate: a linear warm-up, then a cosine down to a tenth of the peak."""
    if step < WARMUP:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * done))


def pretrain(config: Any, tokenizer: PreTrainedTokenizerBase, steps: int) -> tuple[Any, dict[str, Any]]:
    """Train one model from seeded random weights, and return it with the summary that is committed along with it."""
    started = time.perf_counter()
    train, validation = token_stream(tokenizer, "train"), token_stream(tokenizer, "validation")
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    first = evaluate(model, validation)
    model.train()
    for step, batch in enumerate(batches(train, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}/{steps} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)
    model.config.use_cache = True
    return model, {
        "validation_loss_before": round(first, 4),
        "validation_loss": round(evaluate(model, validation), 4),
        "unigram_entropy": round(unigram_entropy(train, validation), 4),
        "train_tokens": len(train),
        "steps": steps,
        "batch_shapes": SHAPES,
        "seed": SEED,
        "parameters": model.num_parameters(),
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
    }


@torch.no_grad()
def sample_loss(model: Any, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the mean next-token loss on ``SAMPLE``, which shows whether weights match their summary."""
    ids = torch.tensor([tokenizer(SAMPLE)["input_ids"]])
    return float(model.eval()(input_ids=ids, labels=ids, use_cache=False).loss)


def save(directory: Path, model: Any, tokenizer: PreTrainedTokenizerBase, summary: dict[str, Any]) -> None:
    """Write a Hugging Face directory and its ``pretraining.json``."""
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    summary["sample_loss"] = round(sample_loss(model, tokenizer), 6)
    (directory / "pretraining.json").write_text(json.dumps(summary, indent=2) + "\n")


def main() -> None:
    """Build everything; a smaller ``--steps`` is faster but gives worse models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps per model (default: {STEPS})")
    parser.add_argument("--only", choices=MODEL_NAMES, help="pretrain only this model")
    arguments = parser.parse_args()

    # A single thread always adds in the same order, so the result does not depend on the number of cores.
    torch.set_num_threads(1)
    tokenizers = build_tokenizers(train_vocabulary())
    settings = configurations(tokenizers)
    for name in [arguments.only] if arguments.only else MODEL_NAMES:
        print(name, flush=True)
        config = AutoConfig.for_model(**settings[name])
        model, summary = pretrain(config, tokenizers[name], arguments.steps)
        save(model_directory(name), model, tokenizers[name], summary)
        print(json.dumps(summary, indent=2), flush=True)
    small = model_directory("embedded/gpt2-small")
    AutoConfig.for_model(**settings["embedded/gpt2-small"], architectures=["GPT2LMHeadModel"]).save_pretrained(small)
    tokenizers["embedded/gpt2"].save_pretrained(small)


if __name__ == "__main__":
    main()
