"""Side effects of ``build_engine``: seeds, the schedule, training mode, and a check of its arguments."""

from __future__ import annotations

import pytest
import torch

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine import build_engine
from tutorial_lib.engine.learning_rate import Schedule
from tutorial_lib.mpu import Topology

SETTINGS = {"engine": "torch", "dp": 1, "random_init": True, "learning_rate": 0.1}
ALONE = Topology.from_environment(Config.create(dp=1).parallel)


def test_this_process_is_alone_without_a_process_group():
    assert Topology(dp=1, tp=1, rank=0) == ALONE
    with pytest.raises(ConfigError, match="but 1 processes were started"):
        Topology.from_environment(Config.create(dp=2).parallel)


def test_an_engine_is_ready_to_train_and_seeded():
    config = Config.create(**SETTINGS, seed=3)
    torch.manual_seed(99)
    engine, drawn = build_engine(config, ALONE, 10), torch.rand(())
    other = build_engine(config, ALONE, 10)
    assert engine.module.training
    assert torch.rand(()) == drawn, "dropout must not depend on earlier random numbers"
    for name, parameter in engine.module.named_parameters():
        assert parameter.equal(other.module.get_parameter(name)), name


def test_a_step_moves_the_learning_rate_on():
    engine = build_engine(Config.create(**SETTINGS, schedule="linear", warmup_steps=2), ALONE, 4)
    rates = []
    for _ in range(4):
        rates.append(engine.schedule.rate)
        engine.step()
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05])


def test_a_position_in_a_schedule_holds_for_another_number_of_parameter_groups():
    settings = Config.create(learning_rate=0.1, schedule="linear").optimizer

    def schedule(groups):
        parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return optimizer, Schedule(settings, optimizer, 10)

    optimizer, first = schedule(1)
    for _ in range(4):
        optimizer.step()
        first.step()
    optimizer, second = schedule(3)
    second.load_state_dict(first.state_dict())
    assert first.rate == second.rate == pytest.approx(0.06)
    assert [group["lr"] for group in optimizer.param_groups] == [first.rate] * 3


def test_a_configuration_that_omits_what_its_deepspeed_file_states_is_refused():
    config = Config.create(dp=1, deepspeed="zero2")
    with pytest.raises(ConfigError, match=r"deepspeed='zero2' contains settings.*launch\.preflight"):
        build_engine(config, ALONE, 1)


def test_the_hugging_face_trainer_is_not_an_engine_for_your_own_loop():
    message = r"engine='trainer' .*`python -m tutorial_lib train --engine trainer`.*'deepspeed', 'fsdp' or 'torch'"
    with pytest.raises(ConfigError, match=message):
        build_engine(Config.create(engine="trainer", dp=1, random_init=True), ALONE, 1)
