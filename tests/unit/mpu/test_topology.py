"""Rank grid."""

import pytest

from tutorial_lib.config import ConfigError, ParallelConfig
from tutorial_lib.mpu import ModelParallelUnit, Topology


def test_the_grid_of_the_documentation():
    topology = Topology(dp=2, tp=2, rank=0)
    assert topology.grid() == [[0, 1], [2, 3]]
    assert [(t.dp_rank, t.tp_rank) for t in (Topology(2, 2, rank) for rank in range(4))] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (4, 1), (1, 4), (2, 3), (3, 2)])
def test_every_place_in_the_grid_belongs_to_one_rank(dp, tp):
    places = [Topology(dp, tp, rank) for rank in range(dp * tp)]
    assert len({(t.dp_rank, t.tp_rank) for t in places}) == dp * tp == places[0].world_size
    assert all(t.grid()[t.dp_rank][t.tp_rank] == t.rank for t in places)


def test_ranks_of_a_tensor_parallel_group_are_adjacent_and_read_the_same_data():
    for group in Topology(dp=3, tp=4, rank=0).grid():
        assert group == list(range(group[0], group[0] + 4))
        assert len({Topology(3, 4, rank).dp_rank for rank in group}) == 1


@pytest.mark.parametrize(
    ("dp", "tp", "advice"),
    [
        (2, 1, "Write dp=3, or start 2 processes"),
        (1, 2, "3 is not a multiple of tp=2. Write dp=3 and tp=1, or start 2 processes"),
        (1, 4, "3 is not a multiple of tp=4. Write dp=3 and tp=1, or start 4 processes"),
    ],
)
def test_another_number_of_processes_is_refused(dp, tp, advice):
    said = rf"dp x tp = {dp} x {tp} = {dp * tp}, but 3 processes were started\. {advice}\."
    with pytest.raises(ConfigError, match=said):
        Topology.create(ParallelConfig(dp=dp, tp=tp), rank=0, world_size=3)


def test_a_group_that_would_span_nodes_is_refused():
    """There are two nodes of two ranks each."""
    place = {"rank": 0, "world_size": 4, "local_world_size": 2}
    assert Topology.create(ParallelConfig(dp=2, tp=2), **place) == Topology(2, 2, 0)
    with pytest.raises(
        ConfigError, match=r"tp=4 does not divide the 2 ranks of this node.*Write tp as one of \[1, 2\]"
    ):
        Topology.create(ParallelConfig(dp=1, tp=4), **place)


def test_a_size_that_does_not_divide_a_nodes_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"tp=3 does not divide the 4 ranks.*one of \[1, 2, 4\]"):
        Topology.create(ParallelConfig(dp=4, tp=3), rank=0, world_size=12, local_world_size=4)


def test_the_grid_and_the_axes_as_one_rank_sees_them():
    topology = Topology(dp=2, tp=2, rank=3)
    assert topology.axes() == {"tp": [2, 3], "dp": [1, 3]}
    assert topology.drawing().split() == ["tp", "0", "tp", "1", "dp", "0", "0", "1", "dp", "1", "2", "3"]


def test_the_model_parallel_unit_answers_deepspeed():
    class Mesh:
        def get_group(self, axis):
            return f"group along {axis}"

    unit = ModelParallelUnit(Topology(dp=2, tp=4, rank=6), Mesh())
    assert (unit.get_data_parallel_world_size(), unit.get_data_parallel_rank()) == (2, 1)
    assert (unit.get_model_parallel_world_size(), unit.get_model_parallel_rank()) == (4, 2)
    assert unit.get_data_parallel_group() == "group along dp"
    assert unit.get_model_parallel_group() == "group along tp"
