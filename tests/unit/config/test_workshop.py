"""Names of the original workshop's experiments, which are read, or refused with a reason."""

import pytest

from tutorial_lib.config import ConfigError
from tutorial_lib.config.workshop import Experiment, parse_experiment


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("2ZO-1G1N", Experiment(2, "optimizer", False, gpus=1, nodes=1)),
        ("3Z-8G4N", Experiment(3, "none", False, gpus=8, nodes=4)),
        ("3ZO-16G2N", Experiment(3, "all", False, gpus=16, nodes=2)),
        ("1ZOP-4G1N", Experiment(1, "optimizer", True, gpus=4, nodes=1)),
        ("0Z-2G1N", Experiment(0, "none", False, gpus=2, nodes=1)),
    ],
)
def test_valid_experiment_names(name, meaning):
    assert parse_experiment(name) == meaning


def test_gpus_are_counted_over_all_nodes():
    assert parse_experiment("3Z-8G4N").gpus_per_node == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("4Z-1G1N", "not an experiment of the workshop. Write a name such as 2ZO-1G1N"),
        ("2zo-1g1n", "not an experiment"),
        ("2Z-0G1N", "not an experiment"),
        ("3Z-6G4N", "4 nodes cannot share 6 GPUs evenly. Write 4G4N or 6G1N"),
        ("3Z-2G4N", "Write 4G4N or 2G1N"),
        ("0ZO-1G1N", "stage 0 has nothing to offload. Write 0Z-1G1N"),
    ],
)
def test_an_invalid_experiment_name_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_experiment(name)
