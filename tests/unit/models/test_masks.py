"""Attention masks: documents that share a row have the same logits as on their own, for every family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.models import load_model, set_activation_checkpointing, slice_alibi
from tutorial_lib.models.loading import prepare

families = pytest.mark.parametrize("name", MODEL_NAMES)


def packed_batch(lengths: list[int], total: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return random documents, and one row that packs them, with its padding as one more document."""
    generator = torch.Generator().manual_seed(0)
    docs = [torch.randint(4, 2040, (length,), generator=generator) for length in [*lengths, total - sum(lengths)]]
    owner = torch.cat([torch.full((len(doc),), number) for number, doc in enumerate(docs)])
    mask = (owner[:, None] == owner[None, :]) & torch.ones(total, total, dtype=torch.bool).tril()
    return docs[:-1], {
        "input_ids": torch.cat(docs)[None],
        "attention_mask": mask[None, None],
        "position_ids": torch.cat([torch.arange(len(doc)) for doc in docs])[None],
    }


@families
def test_packed_documents_have_the_logits_they_have_alone(name):
    model = load_model(name).eval()
    docs, batch = packed_batch([40, 3, 77], 160)
    with torch.no_grad():
        together = model(**batch).logits[0]
        start = 0
        for doc in docs:
            alone = model(input_ids=doc[None]).logits[0]
            torch.testing.assert_close(together[start : start + len(doc)], alone, atol=2e-5, rtol=0)
            start += len(doc)


def test_without_our_patch_bloom_fails_on_packed_batches():
    """load_model's patch is needed: transformers' own BLOOM fails on the mask that all other families take."""
    model = AutoModelForCausalLM.from_pretrained(model_directory("embedded/bloom"))
    with pytest.raises(ValueError, match="too many values to unpack"):
        model(**packed_batch([5, 6], 16)[1])


@families
def test_each_packed_row_of_a_batch_keeps_its_own_mask(name):
    """The batch has two rows with different borders, and ALiBi is built for each row."""
    model = load_model(name).eval()
    first, second = packed_batch([9, 14], 32)[1], packed_batch([20, 6], 32)[1]
    both = {key: torch.cat([first[key], second[key]]) for key in first}
    with torch.no_grad():
        together = model(**both).logits
        for row, batch in enumerate((first, second)):
            torch.testing.assert_close(together[row], model(**batch).logits[0], atol=2e-5, rtol=0)


@families
def test_logits_of_fully_masked_positions_are_finite(name):
    model = load_model(name)
    _, batch = packed_batch([10], 20)
    batch["attention_mask"][:, :, 10:] = False
    logits = model(**batch).logits
    assert logits.isfinite().all()
    logits[0, :10].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_on_the_right_changes_nothing(name, dtype):
    model = load_model(name, dtype=dtype).eval()
    ids = torch.arange(10, 34)[None]
    mask = (torch.arange(24) < 15).long()[None]
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[0, :15]
        alone = model(input_ids=ids[:, :15]).logits[0]
    tolerance = 2e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(padded, alone, atol=tolerance, rtol=0)


@families
def test_bf16_takes_packed_batches(name):
    model = load_model(name, dtype=torch.bfloat16).eval()
    docs, batch = packed_batch([30, 30], 64)
    with torch.no_grad():
        together, alone = model(**batch).logits[0, 30:60], model(input_ids=docs[1][None]).logits[0]
    assert together.dtype == torch.bfloat16
    torch.testing.assert_close(together, alone, atol=0.15, rtol=0)


@families
def test_recomputed_activations_give_the_same_gradients(name):
    _, batch = packed_batch([12, 9], 24)
    gradients = []
    for recompute in (False, True):
        model = load_model(name).train()
        if recompute:
            set_activation_checkpointing(model)
        model(**batch).logits.logsumexp(-1).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        assert model.is_activation_checkpointing is recompute
    for parameter, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_parallel_rank_gets_the_slopes_of_its_own_heads(tp, packed):
    _, batch = packed_batch([5, 7], 16)
    mask = torch.ones(2, 16, dtype=torch.int64)
    if packed:
        mask = torch.zeros(1, 1, 16, 16).masked_fill(~batch["attention_mask"], -1.0)
    model = load_model("embedded/bloom")
    full = model.transformer.build_alibi_tensor(mask, 8, torch.float32).unflatten(0, (-1, 8))
    shares = []
    for tp_rank in range(tp):
        model = load_model("embedded/bloom")
        model.transformer.num_heads = 8 // tp  # as AutoTP leaves it
        slice_alibi(model, tp, tp_rank)
        assert model.transformer.num_heads == 8
        shares.append(model.transformer.build_alibi_tensor(mask, 8, torch.float32).unflatten(0, (-1, 8 // tp)))
    assert torch.cat(shares, dim=1).equal(full)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_layers_with_a_window_keep_it_in_packed_batches(family):
    """The documents are longer than the window, so losing the window would change their logits."""
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=2048, sliding_window=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] if family == "gemma3_text" else None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = prepare(AutoModelForCausalLM.from_config(config).eval(), ())
    docs, batch = packed_batch([20, 30], 64)
    with torch.no_grad():
        together, start = model(**batch).logits[0], 0
        for doc in docs:
            alone = model(input_ids=doc[None]).logits[0]
            torch.testing.assert_close(together[start : start + len(doc)], alone, atol=1e-5, rtol=0)
            start += len(doc)
