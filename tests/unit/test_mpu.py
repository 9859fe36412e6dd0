"""The rank grid."""

import pytest

from tutorial_lib.config import ConfigError, ParallelConfig
from tutorial_lib.mpu import Topology


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
def test_every_place_is_taken_once_and_agrees_with_the_grid(dp, tp):
    places = [Topology(dp, tp, rank) for rank in range(dp * tp)]
    assert len({(t.dp_rank, t.tp_rank) for t in places}) == dp * tp == places[0].world_size
    assert all(t.grid()[t.dp_rank][t.tp_rank] == t.rank for t in places)


def test_ranks_of_a_tensor_parallel_group_are_adjacent_and_read_the_same_data():
    for group in Topology(dp=3, tp=4, rank=0).grid():
        assert group == list(range(group[0], group[0] + 4))
        assert len({Topology(3, 4, rank).dp_rank for rank in group}) == 1


def test_another_number_of_processes_is_refused():
    with pytest.raises(ConfigError, match=r"dp x tp = 2 x 1 = 2, but 3 processes were started. Write dp=3"):
        Topology.create(ParallelConfig(dp=2), rank=0, world_size=3)
