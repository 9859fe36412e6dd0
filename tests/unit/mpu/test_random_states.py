"""Random states, which are captured and restored."""

import torch

from tutorial_lib.mpu.random_states import capture_random_states, restore_random_states


def test_random_states_are_restored(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    draw()
    states = capture_random_states(torch.device("cpu"))
    torch.save(states, tmp_path / "states.pt")
    expected = draw()
    draw()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True), torch.device("cpu"))
    assert draw() == expected
