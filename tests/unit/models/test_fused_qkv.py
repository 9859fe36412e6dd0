"""Column orders of GPT-2's fused projection: by part when saved, by rank when cut."""

from __future__ import annotations

import pytest
import torch

from tutorial_lib.models.fused_qkv import by_part, by_rank, is_fused_by_part


def test_columns_by_rank_match_the_picture():
    assert "".join("QqKkVv"[i] for i in by_rank(torch.arange(6), 2).tolist()) == "QKVqkv"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_by_part_undoes_by_rank(tp):
    weight = torch.arange(5 * 24).view(5, 24)
    assert by_part(by_rank(weight, tp), tp).equal(weight)


@pytest.mark.parametrize("tp", [2, 4])
def test_each_rank_gets_its_heads_of_all_three(tp):
    query, key, value = torch.rand(5, 8), torch.rand(5, 8), torch.rand(5, 8)
    pieces = by_rank(torch.cat([query, key, value], -1), tp).chunk(tp, -1)
    for rank, piece in enumerate(pieces):
        assert piece.equal(torch.cat([part.chunk(tp, -1)[rank] for part in (query, key, value)], -1))


def test_only_gpt2_fuses_by_part():
    assert is_fused_by_part("transformer.h.0.attn.c_attn.bias", "gpt2")
    assert not is_fused_by_part("transformer.h.0.attn.c_proj.bias", "gpt2")
    assert not is_fused_by_part("transformer.h.0.attn.c_attn.bias", "other")
