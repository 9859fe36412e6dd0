"""A DeepSpeed configuration states what DeepSpeed would otherwise decide silently, and refuses what it would ignore."""

import json

import pytest
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from transformers import AutoConfig

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine.deepspeed import config as ds_config
from tutorial_lib.models import load_config

SHIPPED = sorted(path.stem for path in ds_config.DIRECTORY.glob("*.json"))


def write(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_is_always_stated(stage):
    assert ds_config.build(Config.create(zero_stage=stage, gradient_clipping=0.0))["gradient_clipping"] == 0.0


def test_persistence_threshold_is_stated_at_stage_3():
    zero = ds_config.build(Config.create(zero_stage=3))["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
@pytest.mark.parametrize("pin", [True, False])
def test_every_offload_states_pin_memory(stage, offload, pin):
    zero = ds_config.build(Config.create(zero_stage=stage, offload=offload, pin_memory=pin))["zero_optimization"]
    parts = [zero[part] for part in ("offload_optimizer", "offload_param") if part in zero]
    assert len(parts) == (2 if offload == "all" else 1)
    assert all(part == {"device": "cpu", "pin_memory": pin} for part in parts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, "'offload_optimizer' .* belongs under 'zero_optimization'"),
        ({"offload_param": {"device": "cpu"}}, "'offload_param' .* belongs under 'zero_optimization'"),
        ({"stage": 2}, "'stage' .* belongs under 'zero_optimization'"),
        ({"zero_optimization": {"gradient_clipping": 1.0}}, "belongs at the top level"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "did you mean 'device'"),
        ({"zero_optimization": 3}, "zero_optimization is 3; write an object"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule and warmup_steps"),
    ],
)
def test_misplaced_and_unknown_keys_are_refused_and_shown_their_place(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        ds_config.apply_file(Config.create(deepspeed=write(tmp_path, given)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'stage': 3}", "not valid JSON"),
        ("[]", "needs an object"),
        ({"zero_optimization": {"stage": 4}}, "stages 0, 1, 2 and 3"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "offload_param without"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offloads to 'cpu'"),
        ({"train_batch_size": 6}, "train_batch_size is 6, but global_batch=8"),
        ({"optimizer": {"type": "Lion"}}, "trains with AdamW. Write that"),
        ({"fp16": {"enabled": True}}, "needs a GPU"),
    ],
)
def test_a_file_that_cannot_run(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        ds_config.apply_file(Config.create(deepspeed=write(tmp_path, content)))


def test_a_missing_file_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="zero2_cpu_offload_pinned_memory"):
        ds_config.read("zero9")


def test_the_file_decides_and_the_record_tells(tmp_path):
    path = write(
        tmp_path,
        {
            "train_batch_size": "auto",
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.8, 0.95], "eps": "auto"}},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        },
    )
    config = ds_config.apply_file(Config.create(deepspeed=path))
    assert (config.engine.zero_stage, config.engine.offload, config.engine.pin_memory) == (2, "optimizer", True)
    assert (config.engine.precision, config.optimizer.gradient_clipping) == ("bf16", 0.5)
    assert (config.optimizer.learning_rate, config.optimizer.beta1, config.optimizer.beta2) == (2e-5, 0.8, 0.95)
    built = ds_config.build(config)
    assert "optimizer" not in built
    assert built["train_batch_size"] == 8


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_run_and_differ_in_what_their_name_says(name):
    config = ds_config.apply_file(Config.create(deepspeed=name))
    assert config.engine.zero_stage == int(name[4])
    assert (config.engine.offload != "none") == ("offload" in name)
    assert config.engine.pin_memory == ("pinned" in name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autotp_keeps_tied_embeddings_whole(stage):
    assert "tensor_parallel" not in ds_config.build(Config.create(zero_stage=stage))
    built = ds_config.build(Config.create(zero_stage=stage, dp=2, tp=4))
    assert built["tensor_parallel"] == {"autotp_size": 4, "vocab_parallel_lm_head": False}
    assert built["train_batch_size"] == 2 * built["train_micro_batch_size_per_gpu"]


def test_a_file_cannot_ask_for_another_tensor_parallel_size(tmp_path):
    path = write(tmp_path, {"tensor_parallel": {"autotp_size": 4}})
    with pytest.raises(ConfigError, match=r"autotp_size is 4, but tp=2. Write tp=4"):
        ds_config.build(Config.create(tp=2, deepspeed=path))
    with pytest.raises(ConfigError, match=r"autotp_size is 4, but tp=1"):
        ds_config.build(Config.create(deepspeed=path))


@pytest.mark.parametrize(("version", "taken"), [("0.19.3", False), ("0.19.4", True), ("0.20.0+cpu", True)])
def test_stage_3_needs_a_deepspeed_that_splits_it(monkeypatch, version, taken):
    monkeypatch.setattr(ds_config.importlib.metadata, "version", lambda name: version)
    config, model = Config.create(tp=2, zero_stage=3), load_config("embedded/qwen2")
    for stage in (0, 1, 2):
        ds_config.check_tensor_parallel(config.override(zero_stage=stage), model)
    if taken:
        ds_config.check_tensor_parallel(config, model)
    else:
        with pytest.raises(
            ConfigError, match=f"needs DeepSpeed 0.19.4, and {version} is installed. Write zero_stage=2"
        ):
            ds_config.check_tensor_parallel(config, model)


def test_16_bits_without_zero_are_refused():
    model = load_config("embedded/qwen2")
    with pytest.raises(ConfigError, match=r"norm that is too small. Write zero_stage=1, or precision='fp32'"):
        ds_config.check_tensor_parallel(Config.create(tp=2, zero_stage=0, precision="bf16"), model)
    ds_config.check_tensor_parallel(Config.create(tp=1, zero_stage=0, precision="bf16"), model)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gpt2", "whose Conv1D layers keep their weights transposed"), ("opt", "without a tensor-parallel plan"),
     ("mixtral", r"with \['moe_tp_experts'.*\] in it")],
)  # fmt: skip
def test_what_autotp_does_not_split_is_refused(model_type, why):
    config = Config.create(tp=2, zero_stage=1)
    with pytest.raises(ConfigError, match=f"AutoTP does not split {model_type}, a model {why}. Write tp=1, or choose"):
        ds_config.check_tensor_parallel(config, AutoConfig.for_model(model_type))
    for name in ("qwen2", "llama", "mistral", "bloom"):
        ds_config.check_tensor_parallel(config, AutoConfig.for_model(name))


def test_bloom_gets_deepspeeds_plan_and_others_their_own():
    for name, preset in (("bloom", {"preset_model": "bloom"}), ("qwen2", {})):
        settings = {"tensor_parallel": {}}
        ds_config.add_plan(settings, load_config(f"embedded/{name}"))
        assert settings["tensor_parallel"] == preset


def test_the_key_tables_are_deepspeeds_own():
    def names(model):
        return {field.alias or name for name, field in model.model_fields.items()}

    renamed = {
        "stage3_gather_fp16_weights_on_model_save",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "cpu_offload",
    }
    assert ds_config.SECTION_KEYS["zero_optimization"] == names(DeepSpeedZeroConfig) - renamed
    assert ds_config.SECTION_KEYS["zero_optimization.offload_optimizer"] == names(DeepSpeedZeroOffloadOptimizerConfig)
    assert ds_config.SECTION_KEYS["zero_optimization.offload_param"] == names(DeepSpeedZeroOffloadParamConfig)
    assert ds_config.SECTION_KEYS["tensor_parallel"] == names(TPTrainingConfig)
