"""Check of lesson 02's parameters, picture of the grid, and the exercises."""

from __future__ import annotations

import inspect

import pytest

from tutorial_lib.config import ConfigError
from tutorial_lib.lab import tensor_parallel
from tutorial_lib.lab.scripts import train_2d


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (1, 4), (8, 2)])
def test_grids_that_can_share_a_step_pass(dp: int, tp: int) -> None:
    tensor_parallel.check_parameters(dp, tp, "qwen2", rows=16)


@pytest.mark.parametrize(
    ("dp", "tp", "family", "instead"),
    [
        (2, 1, "qwen2", "TP = 1 splits no layer.*Write TP = 2"),
        (3, 2, "qwen2", r"16 rows.*DP x TP = 6 ranks\. Write DP as one of \[1, 2, 4, 8\]"),
        (1, 3, "qwen2", "Write TP = 2 and DP = 2"),
        (2, 2, "gpt2", "no plan for a gpt2 model. Write MODEL = 'embedded/qwen2'"),
    ],
)
def test_other_parameters_are_refused_before_anything_starts(dp: int, tp: int, family: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=instead):
        tensor_parallel.check_parameters(dp, tp, family, rows=16)


def test_the_families_are_those_of_the_script() -> None:
    assert repr(tensor_parallel.SPLIT_BY_HAND) in inspect.getsource(train_2d.build_model).replace('"', "'")


def test_the_picture_names_the_grid() -> None:
    drawn = tensor_parallel.draw_grid(2, 3)
    assert "2 x 3" in drawn.title and "2 rows" in drawn.alt and "3 columns" in drawn.alt


def test_the_global_batch_counts_ranks_that_read_different_rows() -> None:
    batch = tensor_parallel.global_batch(micro_batch=2, dp=4, tp=2, accumulation=4)
    assert batch.check(32).right is True
    assert batch.check(64).right is False and "every process" in batch.check(64).reason
    assert batch.check(8).right is False and "one pass" in batch.check(8).reason


def test_tp_divides_both_kinds_of_heads_and_the_node() -> None:
    largest = tensor_parallel.largest_tp(heads=28, kv_heads=4, gpus_per_node=8)
    assert largest.check(4).right is True
    assert largest.check(8).right is False and "the same number of heads" in largest.check(8).reason
    assert largest.check(7).right is False and "key-value heads" in largest.check(7).reason
    few = tensor_parallel.largest_tp(heads=16, kv_heads=2, gpus_per_node=8)
    assert few.check(2).right is True and "key-value heads" in few.check(8).reason


def test_gradient_partners_are_a_column_of_the_grid() -> None:
    partners = tensor_parallel.gradient_partners(rank=5, dp=4, tp=2)
    assert partners.check([1, 3, 5, 7]).right is True and partners.check({7, 5, 3, 1}).right is True
    assert partners.check([4, 5]).right is False and "a row of the grid" in partners.check([4, 5]).reason
    assert "Add rank 5" in partners.check([1, 3, 7]).reason
    assert "a column" in partners.check([0, 2, 4, 6]).reason
    assert partners.check(5).right is False and "another form" in partners.check(5).reason
    assert partners.check().right is None


def test_only_activations_grow_with_the_sequence() -> None:
    grows = tensor_parallel.what_grows()
    assert grows.check("tensor parallel").right is True
    assert grows.check("ZeRO-3").right is False and grows.check("both").right is False
