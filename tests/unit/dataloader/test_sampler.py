"""Order of examples: the examples of a step, the ranks that read them, and the place where a resumed run continues."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

from tutorial_lib.config import ConfigError
from tutorial_lib.dataloader import build_epoch_loader, build_eval_loader, build_train_loader
from tutorial_lib.dataloader.sampler import StepSampler, epoch_order
from tutorial_lib.mpu import Topology

BATCHINGS = ("max_length", "longest", "packed")


def row_numbers(batch, tokenizer):
    """Return the numbers at the start of all texts in a batch."""
    texts = [tokenizer.decode(ids) for ids in batch["input_ids"]]
    return [int(number) for text in texts for number in re.findall(r"(\d{5}):", text)]


def step_numbers(micro_batches, tokenizer):
    return sorted(itertools.chain.from_iterable(row_numbers(batch, tokenizer) for batch in micro_batches))


def place(dp=1, dp_rank=0):
    return Topology(dp=dp, tp=1, rank=dp_rank)


def read(loader, num_steps):
    return [micro_batches for _, micro_batches in itertools.islice(loader.steps(), num_steps)]


def equal(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


def random_cases(count):
    choose = random.Random(0)
    for _ in range(count):
        dp, micro_batch, accumulation = choose.choice([1, 2, 3, 4]), choose.choice([1, 2, 3]), choose.choice([1, 2, 3])
        global_batch = dp * micro_batch * accumulation
        num_rows = global_batch + choose.randrange(3 * global_batch + 1)
        yield num_rows, global_batch, dp, choose.randrange(5), choose.choice([True, False])


@pytest.mark.parametrize("num_rows, global_batch, dp, seed, grouped", list(random_cases(60)))
def test_ranks_share_out_each_step_of_the_reference_order(num_rows, global_batch, dp, seed, grouped):
    lengths = np.random.default_rng(num_rows).integers(1, 500, num_rows) if grouped else None
    order = {"global_batch": global_batch, "seed": seed, "lengths": lengths}
    ranks = [iter(StepSampler(num_rows, dp_rank=rank, dp_size=dp, **order)) for rank in range(dp)]
    steps_per_epoch = num_rows // global_batch
    for epoch in range(3):
        reference = epoch_order(num_rows, epoch=epoch, **order)
        assert reference.shape == (steps_per_epoch, global_batch)
        assert len(set(reference.flat)) == reference.size, "an epoch repeats no example"
        for step in reference:
            shares = [next(rank) for rank in ranks]
            assert {len(share) for share in shares} == {global_batch // dp}
            assert sorted(itertools.chain(*shares)) == sorted(step)
            if lengths is not None:
                totals = [lengths[share].sum() for share in shares]
                assert max(totals) - min(totals) <= lengths[step].max() - lengths[step].min()


def test_epochs_and_seeds_have_their_own_order():
    def order(seed, epoch):
        return epoch_order(103, global_batch=10, seed=seed, epoch=epoch)

    orders = [order(seed, epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert all(a != b for a, b in itertools.combinations(orders, 2)), "seed 0, epoch 1 must differ from seed 1, epoch 0"
    left_out = [set(range(103)) - set(order(0, epoch).flat) for epoch in range(4)]
    assert all(len(rest) == 3 for rest in left_out)
    assert len(set.union(*left_out)) == 12, "different examples are left out each time"


def test_length_groups_are_of_one_length_and_still_shuffled():
    lengths = np.random.default_rng(0).integers(1, 513, 6400)
    plain = epoch_order(6400, global_batch=8, seed=0, epoch=0)
    grouped = epoch_order(6400, global_batch=8, seed=0, epoch=0, lengths=lengths)

    def efficiency(order):
        return lengths[order].sum() / (lengths[order].max(axis=1) * 8).sum()

    assert efficiency(plain) < 0.58
    assert efficiency(grouped) > 0.97
    rises = np.diff(lengths[grouped].mean(axis=1)) > 0
    assert 0.45 < rises.mean() < 0.55, "steps of all lengths follow each other at random"


@pytest.mark.parametrize("num_steps", [2, 5, 40, 400])
def test_length_groups_differ_between_epochs(num_steps):
    lengths = np.arange(8 * num_steps)  # no ties that a shuffle could break
    orders = [epoch_order(len(lengths), global_batch=8, seed=0, epoch=epoch, lengths=lengths) for epoch in range(3)]
    steps = [frozenset(step) for order in orders for step in order.tolist()]
    assert len(set(steps)) == len(steps)


def test_longest_groups_by_length_and_max_length_does_not(toy_config, byte_tokenizer):
    def spread(batching):
        config = toy_config(200, batching=batching, global_batch=8, micro_batch=8)
        loader = build_train_loader(config, byte_tokenizer, place())
        lengths = [batch["attention_mask"].sum(1) for (batch,) in read(loader, loader.steps_per_epoch)]
        return sum(int(step.max() - step.min()) for step in lengths) / len(lengths)

    assert spread("longest") < 4
    assert spread("max_length") > 12


@pytest.mark.parametrize("batching", BATCHINGS)
def test_step_k_does_not_depend_on_ranks_or_micro_batches(toy_config, byte_tokenizer, batching):
    config = toy_config(61, batching=batching, global_batch=12, seed=3, micro_batch=12)
    loader = build_train_loader(config, byte_tokenizer, place())
    num_steps = 2 * loader.steps_per_epoch + 1
    reference = [step_numbers(step, byte_tokenizer) for step in read(loader, num_steps)]
    assert len({tuple(step) for step in reference}) == num_steps
    for dp, micro_batch in [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]:
        other = config.override(dp=dp, micro_batch=micro_batch)
        ranks = [read(build_train_loader(other, byte_tokenizer, place(dp, r)), num_steps) for r in range(dp)]
        for step, shares in zip(reference, zip(*ranks, strict=True), strict=True):
            for share in shares:
                assert len(share) == other.accumulation
                assert {len(batch["input_ids"]) for batch in share} == {micro_batch}
            numbers = [step_numbers(share, byte_tokenizer) for share in shares]
            assert sorted(itertools.chain(*numbers)) == step


def test_step_k_depends_on_seed_data_and_global_batch(toy_config, byte_tokenizer):
    def first(num_rows=61, **flat):
        config = toy_config(num_rows, **{"global_batch": 12, **flat})
        return step_numbers(read(build_train_loader(config, byte_tokenizer, place()), 1)[0], byte_tokenizer)

    assert first() == first()
    assert len({tuple(first(**change)) for change in ({}, {"seed": 1}, {"num_rows": 60}, {"global_batch": 6})}) == 4
    assert max(first(max_examples=12)) == 11


def test_only_ranks_that_share_a_layer_read_the_same_rows(toy_config, byte_tokenizer, monkeypatch):
    config = toy_config(40, dp=2, global_batch=8)
    numbers = []
    for rank in range(4):
        topology = Topology(dp=2, tp=2, rank=rank)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        loader = build_train_loader(config, byte_tokenizer, topology)
        numbers.append([step_numbers(step, byte_tokenizer) for step in read(loader, 3)])
    assert numbers[0] == numbers[1]
    assert numbers[2] == numbers[3]
    assert all(not set(a) & set(b) for a, b in zip(numbers[0], numbers[2], strict=True))


def test_a_grid_that_contradicts_the_configuration_is_refused(toy_config, byte_tokenizer):
    config = toy_config(40, dp=2, global_batch=8)
    for build in (build_train_loader, build_eval_loader):
        with pytest.raises(ConfigError, match="4 ranks, but dp=2"):
            build(config, byte_tokenizer, place(4))


def test_steps_end_with_the_run_or_its_slot(toy_config, byte_tokenizer):
    config = toy_config(40, global_batch=8)
    assert [step for step, _ in build_train_loader(config, byte_tokenizer, place()).steps()] == list(range(1, 26))

    def numbers(**flat):
        return [step for step, _ in build_train_loader(config.override(**flat), byte_tokenizer, place()).steps()]

    assert numbers(epochs=2) == list(range(1, 11))
    assert numbers(epochs=2, stop_after=3) == [1, 2, 3]
    assert numbers(epochs=2, stop_after=99) == numbers(epochs=2)


def test_steps_begin_where_they_are_asked_to(toy_config, byte_tokenizer):
    config = toy_config(65, global_batch=6, micro_batch=3)
    uninterrupted = read(build_train_loader(config, byte_tokenizer, place()), 24)
    loader = build_train_loader(config, byte_tokenizer, place())
    read(loader, 3)
    for start in (13, 0):
        step, micro_batches = next(loader.steps(start=start))
        assert step == start + 1
        assert equal(micro_batches, uninterrupted[start])
    with pytest.raises(ValueError, match="is at step 1, so it cannot give the position after step 2"):
        loader.state_at(2)
    resumed = build_train_loader(config, byte_tokenizer, place())
    resumed.load_state_dict(loader.state_at(1))
    assert equal(read(resumed, 1)[0], uninterrupted[1])


@pytest.mark.parametrize("batching, unit", [("longest", "11 rows"), ("packed", "6 packed rows")])
def test_data_smaller_than_one_global_batch_are_refused(toy_config, byte_tokenizer, batching, unit):
    config = toy_config(11, global_batch=12, batching=batching)
    with pytest.raises(ConfigError, match=rf"has {unit}, fewer than global_batch=12.*smaller global_batch"):
        build_train_loader(config, byte_tokenizer, place())


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 12])
def test_resume_continues_with_the_next_step(toy_config, byte_tokenizer, batching, stop):
    config = toy_config(65, batching=batching, global_batch=6, micro_batch=3, seed=1)

    def build():
        return build_train_loader(config, byte_tokenizer, place())

    uninterrupted = read(build(), 24)
    loader = build()
    for got, expected in zip(read(loader, stop), uninterrupted, strict=False):
        assert equal(got, expected)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    for expected in uninterrupted[stop:]:
        assert equal(read(resumed, 1)[0], expected)
    resumed.load_state_dict(state)
    assert equal(read(resumed, 1)[0], uninterrupted[stop]), "a loader in use can be reset"


@pytest.mark.parametrize("dp, other_dp", [(1, 4), (4, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_position_holds_for_another_number_of_ranks(toy_config, byte_tokenizer, dp, other_dp, stop):
    config = toy_config(65, global_batch=12, micro_batch=1)
    reference = read(build_train_loader(config, byte_tokenizer, place()), 14)
    first = build_train_loader(config.override(dp=dp), byte_tokenizer, place(dp, dp - 1))
    read(first, stop)
    ranks = []
    for rank in range(other_dp):
        loader = build_train_loader(config.override(dp=other_dp), byte_tokenizer, place(other_dp, rank))
        loader.load_state_dict(first.state_dict())
        ranks.append(read(loader, 14 - stop))
    for expected, shares in zip(reference[stop:], zip(*ranks, strict=True), strict=True):
        got = sorted(itertools.chain(*(step_numbers(share, byte_tokenizer) for share in shares)))
        assert got == step_numbers(expected, byte_tokenizer)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_epochs_hold_the_micro_batches_of_the_steps(toy_config, byte_tokenizer, batching):
    config = toy_config(65, batching=batching, global_batch=12, micro_batch=3, seed=1).override(dp=2)
    steps = build_train_loader(config, byte_tokenizer, place(2, 1))
    epochs = build_epoch_loader(config, byte_tokenizer, place(2, 1))
    assert len(epochs) == 2 * epochs.steps_per_epoch == 2 * steps.steps_per_epoch
    for epoch in (0, 1, 2, 1):
        steps = build_train_loader(config, byte_tokenizer, place(2, 1))
        per_epoch = steps.steps_per_epoch
        expected = [batch for step in read(steps, (epoch + 1) * per_epoch)[epoch * per_epoch :] for batch in step]
        before = torch.get_rng_state()
        epochs.set_epoch(epoch)
        assert equal(list(epochs), expected)
        assert torch.equal(torch.get_rng_state(), before), "dropout does not depend on how often a run resumed"


@pytest.mark.parametrize("change", [{"seed": 1}, {"global_batch": 8}, {"max_examples": 60}])
def test_a_position_in_another_order_is_refused(toy_config, byte_tokenizer, change):
    config = toy_config(65, global_batch=16)
    loader = build_train_loader(config, byte_tokenizer, place())
    read(loader, 2)
    other = build_train_loader(config.override(**change), byte_tokenizer, place())
    with pytest.raises(ConfigError, match=r"a different order of examples: \w+=\d+ then, \d+ now"):
        other.load_state_dict(loader.state_dict())


def test_loaders_draw_nothing_from_the_global_generators(toy_config, byte_tokenizer):
    config = toy_config(40, global_batch=8)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    loader = build_train_loader(config, byte_tokenizer, place())
    loader.load_state_dict(loader.state_dict())
    read(loader, 7)
    list(build_eval_loader(config, byte_tokenizer, place()))
    assert torch.equal(torch.get_rng_state(), before[0]), "a resume would change dropout"
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("dp, micro_batch", [(1, 1), (1, 4), (2, 4), (3, 2), (4, 1), (4, 6), (8, 3)])
def test_evaluation_counts_every_example_once_in_equally_many_batches(
    toy_config, byte_tokenizer, batching, dp, micro_batch
):
    global_batch = dp * micro_batch
    config = toy_config(
        7, batching=batching, dp=dp, micro_batch=micro_batch, global_batch=global_batch, max_eval_examples=None
    )
    ranks = [build_eval_loader(config, byte_tokenizer, place(dp, rank)) for rank in range(dp)]
    read_by_rank = [list(loader) for loader in ranks]
    assert {len(loader) for loader in ranks} == {len(batches) for batches in read_by_rank}
    assert len({len(batches) for batches in read_by_rank}) == 1
    batches = list(itertools.chain(*read_by_rank))
    real = [batch for batch in batches if (batch["labels"] != -100).any()]
    numbers = itertools.chain(*(row_numbers(batch, byte_tokenizer) for batch in real))
    assert sorted(numbers) == list(range(21))
    # All tokens of a row are counted except its first: four digits, the colon, the x's, and EOS.
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == sum(6 + i * 7 % 19 for i in range(21))
    assert all(not (batch["labels"][:, 0] != -100).any() for batch in batches)


def test_dummy_batches_exist_and_a_second_pass_is_the_same(toy_config, byte_tokenizer):
    config = toy_config(7, dp=4, micro_batch=6, global_batch=24, max_eval_examples=7)
    loader = build_eval_loader(config, byte_tokenizer, place(4, 3))
    first, second = list(loader), list(loader)
    assert len(first) == 1
    assert (first[0]["labels"] == -100).all()
    assert first[0]["attention_mask"].any()
    assert equal(first, second)
