"""DeepSpeed configuration: it sets every value that DeepSpeed would choose silently, and refuses ignored keys."""

import json
import typing
from pathlib import Path

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel
from transformers import AutoConfig

from tutorial_lib.cli import main
from tutorial_lib.config import Config, ConfigError, EngineConfig, ParallelConfig
from tutorial_lib.engine.deepspeed import config as ds_config
from tutorial_lib.engine.deepspeed import file, keys, run_checks, trainer_file
from tutorial_lib.models import build_model, load_config

SHIPPED = sorted(path.stem for path in file.DIRECTORY.glob("*.json"))


def write(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_is_always_set(stage):
    assert ds_config.build(Config.create(zero_stage=stage, gradient_clipping=0.0))["gradient_clipping"] == 0.0


def test_the_persistence_threshold_is_set_at_stage_3():
    zero = ds_config.build(Config.create(zero_stage=3))["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize(("bucket_size", "gathered"), [(1, 2), (98, 98), (99, 100)])
def test_an_odd_bucket_is_rounded_up_for_all_gathers(bucket_size, gathered):
    """DeepSpeed accepts any bucket for reductions, but only an even one for all-gathers."""
    zero = ds_config.build(Config.create(zero_stage=2, bucket_size=bucket_size))["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (bucket_size, gathered)


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
def test_misplaced_and_unknown_keys_are_refused_with_the_right_place(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        ds_config.apply_file(Config.create(deepspeed=write(tmp_path, given)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n  "a": "x", // why\n  "b": 1\n}', "line 2 has a comment, '// why': JSON has no comments, remove it"),
        ('{\n\n  /* "a", two\n  lines */ "b": 1}', "line 3 has a comment, '/[*] \"a\", two': JSON has no comments"),
        ('{"a": 1} # end', "line 1 has a comment, '# end'"),
        ('{"a": [1,\n],\n}', "line 1 has a comma before ']': remove it; line 2 has a comma before '}': remove it"),
        ('{"a": 1, // last\n}', "a comma before '}': remove it; line 1 has a comment"),
        ('{"url": "http://x/*", "b": }', "not valid JSON: Expecting value: line 1"),
    ],
)
@pytest.mark.parametrize("engine", ["deepspeed", "trainer"])
def test_invalid_json_is_reported_with_its_line(tmp_path, content, message, engine):
    with pytest.raises(ConfigError, match=message):
        ds_config.apply_file(Config.create(engine=engine, deepspeed=write(tmp_path, content)))


def test_a_wrong_file_is_refused_before_anything_starts(tmp_path, capsys):
    name = write(tmp_path, '{"zero_optimization": {"stage": 2}, // offload later\n}')
    assert main(["train", "--engine", "trainer", "--deepspeed", name, "--storage", str(tmp_path / "runs")]) == 2
    printed = capsys.readouterr()
    assert "JSON has no comments, remove it" in printed.err and "starting" not in printed.out + printed.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'stage': 3}", "not valid JSON"),
        ("[]", "needs an object"),
        ({"zero_optimization": {"stage": 4}}, "zero_stage is 4; the largest possible value is 3"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "offload_param without"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 'offloads to "cpu"'),
        ({"train_batch_size": 6}, "train_batch_size is 6, but global_batch=8"),
        ({"optimizer": {"type": "Lion"}}, 'trains with AdamW. Write "AdamW"'),
        ({"fp16": {"enabled": True}}, "needs a GPU"),
    ],
)
def test_a_file_that_cannot_run(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        ds_config.apply_file(Config.create(deepspeed=write(tmp_path, content)))


COMPLETE = dict.fromkeys((*ds_config._BATCH_KEYS, "gradient_clipping"), "auto") | {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_clipping": None}, 'gradient_clipping is missing.*Write gradient_clipping as "auto"'),
        ({"train_batch_size": None}, "train_batch_size is missing"),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing.*as 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto", which the Hugging Face Trainer'),
        ({"zero_optimization": {"stage": 1, "overlap_comm": "auto"}}, "overlap_comm is .*or leave it out"),
        ({"train_batch_size": 6}, "train_batch_size is 6, but global_batch=8"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule and warmup_steps"),
        ({"optimizer": {"type": "Lamb"}}, "trains with AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": False}}}, "PyTorch's AdamW"),
    ],
)
def test_a_file_that_the_hugging_face_trainer_would_not_complete(tmp_path, changes, message):
    content = {key: value for key, value in (COMPLETE | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        ds_config.apply_file(Config.create(engine="trainer", deepspeed=write(tmp_path, content)))


def test_fp16_without_zero_is_refused_under_the_hugging_face_trainer():
    asked = {"engine": "trainer", "precision": "fp16", "device": "cuda"}
    with pytest.raises(ConfigError, match=r"zero0: with stage 0 and fp16.* Write precision='bf16', stage 1, or"):
        ds_config.apply_file(Config.create(deepspeed="zero0", **asked))
    ds_config.apply_file(Config.create(deepspeed="zero1", **asked))
    ds_config.apply_file(Config.create(deepspeed="zero0", **asked | {"precision": "bf16"}))


def test_an_optimizer_section_becomes_settings_and_does_not_reach_the_hugging_face_trainer(tmp_path):
    path = write(tmp_path, COMPLETE | {"optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "eps": "auto"}}})
    config = ds_config.apply_file(Config.create(engine="trainer", deepspeed=path))
    assert (config.optimizer.learning_rate, config.optimizer.eps) == (2e-5, 1e-8)
    assert trainer_file.for_trainer(path) == COMPLETE
    with pytest.raises(ConfigError, match=r"learning_rate=2e-05, but learning_rate=0.1 was given"):
        ds_config.apply_file(Config.create(engine="trainer", deepspeed=path, learning_rate=0.1))


@pytest.mark.parametrize("content", [{}, {"type": "auto"}, {"type": "auto", "params": "auto"}])
def test_without_an_optimizer_section_the_runs_settings_apply(tmp_path, content):
    config = ds_config.apply_file(Config.create(learning_rate=2e-5, deepspeed=write(tmp_path, {"optimizer": content})))
    assert config.optimizer.learning_rate == 2e-5


def test_encodings(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8-sig")
    assert file.read(str(path)) == {"zero_optimization": {"stage": 2}}
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"is not UTF-8: .*Write the file again"):
        file.read(str(path))


def test_a_missing_file_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="zero2_cpu_offload_pinned_memory"):
        file.read("zero9")


def test_the_deepspeed_file_wins_and_the_record_shows_its_values(tmp_path):
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
def test_autotp_does_not_split_tied_embeddings(stage):
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
    split, model = ParallelConfig(tp=2), load_config("embedded/qwen2")
    for stage in (0, 1, 2):
        ds_config.check_autotp(EngineConfig(zero_stage=stage), split, model)
    if taken:
        ds_config.check_autotp(EngineConfig(zero_stage=3), split, model)
    else:
        with pytest.raises(
            ConfigError, match=f"needs DeepSpeed 0.19.4, and {version} is installed. Write zero_stage=2"
        ):
            ds_config.check_autotp(EngineConfig(zero_stage=3), split, model)


def test_16_bits_without_zero_are_refused():
    engine, model = EngineConfig(zero_stage=0, precision="bf16"), load_config("embedded/qwen2")
    with pytest.raises(ConfigError, match=r"norm that is too small. Write zero_stage=1, or precision='fp32'"):
        ds_config.check_autotp(engine, ParallelConfig(tp=2), model)
    ds_config.check_autotp(engine, ParallelConfig(tp=1), model)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gpt2", "whose Conv1D layers keep their weights transposed"), ("opt", "without a tensor-parallel plan"),
     ("mixtral", r"with \['moe_tp_experts'.*\] in its plan")],
)  # fmt: skip
def test_models_that_autotp_does_not_split_are_refused(model_type, why):
    engine, split = EngineConfig(zero_stage=1), ParallelConfig(tp=2)
    with pytest.raises(ConfigError, match=f"AutoTP does not split {model_type}, a model {why}. Write tp=1, or choose"):
        ds_config.check_autotp(engine, split, AutoConfig.for_model(model_type))
    for name in ("qwen2", "llama", "mistral", "bloom"):
        ds_config.check_autotp(engine, split, AutoConfig.for_model(name))


def test_bloom_gets_deepspeeds_plan_and_others_their_own():
    for name, preset in (("bloom", {"preset_model": "bloom"}), ("qwen2", {})):
        settings = {"tensor_parallel": {}}
        ds_config.add_plan(settings, load_config(f"embedded/{name}"))
        assert settings["tensor_parallel"] == preset


def kind_of(annotation):
    """Return the name that our tables of keys give to one of DeepSpeed's types."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Union else (annotation,)
    nullable = "?" if type(None) in parts else ""
    (one,) = (part for part in parts if part is not type(None)) if len(parts) - bool(nullable) == 1 else (object,)
    if typing.get_origin(one) is list:
        return "list" + nullable
    one = one if isinstance(one, type) else object
    names = (
        (bool, "bool"),
        (int, "int"),
        (float, "float"),
        ((str, Path), "str"),
        (list, "list"),
        (BaseModel, "section"),
    )
    return next((name + nullable for kinds, name in names if issubclass(one, kinds)), "any")


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
        ("tensor_parallel", TPTrainingConfig),
        ("comms_logger", CommsLoggerConfig),
        ("csv_monitor", CSVConfig),
        ("tensorboard", TensorBoardConfig),
        ("wandb", WandbConfig),
        ("comet", CometConfig),
        ("timers.throughput", DeepSpeedThroughputTimerConfig),
        ("compile", CompileConfig),
        ("zero_optimization.leaf_module", DeepSpeedZeroLeafModuleConfig),
    ],
)
def test_the_key_tables_are_deepspeeds_own(section, model):
    theirs = {field.alias or name: kind_of(field.annotation) for name, field in model.model_fields.items()}
    ours = keys.SECTION_KEYS[section]
    assert ours.keys() == theirs.keys()
    assert {name: kind for name, kind in ours.items() if kind not in ("any", theirs[name])} == {}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_stage_or_offload_in_the_file_the_runs_settings_apply(tmp_path, stage):
    for zero in ({}, {"stage": "auto"}, {"overlap_comm": None}):
        for content in ({"zero_optimization": zero}, {}):
            config = Config.create(zero_stage=stage, deepspeed=write(tmp_path, content))
            assert ds_config.apply_file(config).engine.zero_stage == stage
            assert ds_config.build(ds_config.apply_file(config))["zero_optimization"]["stage"] == stage
    if stage == 3:
        config = Config.create(zero_stage=3, offload="all", deepspeed=write(tmp_path, {"zero_optimization": {}}))
        assert ds_config.apply_file(config).engine.offload == "all"


@pytest.mark.parametrize(
    ("content", "flat", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, {"zero_stage": 2}, "zero_optimization.stage is 1, .* zero_stage=2 was"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, {"learning_rate": 1e-4}, "learning_rate=0.0001 was"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}, {"beta2": 0.99}, "beta2=0.99 was given"),
        ({"gradient_clipping": 1.0}, {"gradient_clipping": 0.0}, "gradient_clipping=0.0 was given"),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, "precision='fp32' was given"),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, "precision='bf16' was given"),
        ({"zero_optimization": {"offload_optimizer": None}}, {"offload": "optimizer"}, "offload='optimizer' was given"),
        ({"zero_optimization": {"reduce_bucket_size": 5e7}}, {"bucket_size": 7}, "bucket_size=7 was given"),
    ],
)
def test_a_setting_given_by_hand_that_the_file_contradicts(tmp_path, content, flat, message):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=f"^{path}: .*{message}"):
        ds_config.apply_file(Config.create(deepspeed=path, **flat))
    with pytest.raises(ConfigError, match=message):
        ds_config.apply_file(Config.create(**flat).override(deepspeed=path))


def test_profile_values_and_equal_values_do_not_contradict_the_file(tmp_path):
    path = write(tmp_path, {"bf16": {"enabled": False}, "zero_optimization": {"stage": 2}})
    config = ds_config.apply_file(Config.create("gpu", zero_stage=2, deepspeed=path))
    assert (config.engine.precision, config.engine.zero_stage) == ("fp32", 2)
    assert ds_config.apply_file(config) == config
    assert ds_config.apply_file(Config.from_json(config.to_json())) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage is "2"; .* without quotes: 2'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true; write a whole number"),
        ({"bf16": {"enabled": "false"}}, 'bf16.enabled is "false"; write true or false, without quotes: false'),
        ({"flops_profiler": {"enabled": "true"}}, 'flops_profiler.enabled is "true"; write true or false'),
        ({"gradient_clipping": None}, "gradient_clipping is null; write a number"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1; write a number, at least 0"),
        ({"fp16": None}, "fp16 is null; write an object"),
        ({"zero_optimization": {"sub_group_size": 1.5}}, "sub_group_size is 1.5; write a whole number"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled are both true"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode is false: weight decay is"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "amsgrad is true"),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}}, "'momentum' in optimizer.params would be"),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "write gradient_clipping at the top level"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}, "optimizer.params.betas is 0.9; write two"),
        ({"activation_checkpointing": None}, "activation_checkpointing is null; write an object"),
        ({"activation_checkpointing": [1]}, r"activation_checkpointing is \[1\]; write an object"),
        ({"steps_per_print": 0}, "steps_per_print is 0; write a number above 0"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0; write a number above 0"),
        ({"gradient_predivide_factor": 2}, "gradient_predivide_factor is 2, which DeepSpeed does not accept"),
        ({"prescale_gradients": True}, "prescale_gradients is true, which DeepSpeed does not accept with zero_stage=3"),
        ({"log_level": "loud"}, 'log_level is "loud"; write one of: debug, info'),
        ({"checkpoint": {"tag_validation": "no"}}, 'tag_validation is "no"; write one of: Warn, Ignore, Fail'),
        ({"torch_autocast": {"dtype": "int8"}}, 'torch_autocast.dtype is "int8"; write one of: fp32, bf16, fp16'),
        ({"comms_logger": {"prof_ops": "all"}}, 'prof_ops is "all"; write a list'),
        ({"csv_monitor": {"output_path": 5}}, "csv_monitor.output_path is 5; write a string"),
        ({"csv_monitor": {"output_dir": "x"}}, "'output_dir' is not a key that DeepSpeed knows in csv_monitor"),
        ({"communication_data_type": "fp8"}, 'communication_data_type is "fp8"; write one of: fp32, bf16, fp16'),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights is true, but its kernels"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint is true: checkpoints"),
        ({"zero_optimization": {"zenflow": {}}}, "zenflow is {}: it swaps in a different optimizer"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio is 0.5: part of"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm is false"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is true: a run resumes from its own"),
        ({"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage is true"),
        ({"checkpoint": {"writer": {"type": "FAST"}}}, "this package writes and reads checkpoints itself"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op is "sum": the loss is scaled here'),
        ({"activation_checkpointing": {"partition_activations": True}}, "write the setting activation_checkpointing"),
        (
            {"compile": {"deepcompile": True}},
            "compile.deepcompile needs a compiled model, and no model here is compiled; rem",
        ),
        ({"compile": {"passes": ["z1"]}}, "compile.passes needs a compiled model"),
        ({"compile": {"backend": "inductor"}}, "'backend' is not a key that DeepSpeed knows in compile"),
        ({"deepcompile": True}, "'deepcompile' has no meaning at the top level.* belongs under 'compile'"),
        ({"leaf_module": {"names": []}}, "'leaf_module' has no meaning at the top level.* under 'zero_optimization'"),
        ({"zero_optimization": {"leaf_module": {"klasses": []}}}, "'klasses' is not a key .* did you mean 'classes'"),
        ({"zero_optimization": {"leaf_module": {"classes": "A"}}}, 'leaf_module.classes is "A"; write a list'),
        ({"zero_optimization": {"leaf_module": {"classes": [3]}}}, r"classes is \[3\]; write a list of strings"),
        (
            {"zero_optimization": {"stage": 2, "leaf_module": {"classes": ["A"]}}},
            "would have no effect with zero_stage=2",
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 5e7}},
            "stage3_prefetch_bucket_size is for partitioned parameters, and would have no effect with zero_stage=2",
        ),
        ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 2}}, "no effect with zero_stage=1"),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": 97}},
            "allgather_bucket_size is 97, and DeepSpeed does not accept odd numbers with zero_stage=2. Write 98",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu", "nvme_path": "/nvme"}}},
            "offload_param.nvme_path is for offload to NVMe disks",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "fast_init": True}}}, "for offload to NVMe"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
            'offload_optimizer.device is "nvme"; this package offloads to "cpu" or "none"',
        ),
        ({"bf16": {"enable": True}}, r"did you mean 'enabled'\?$"),
        (
            {"zero_optimization": {"stage3_module_granularity_threshold": 9}},
            "threshold is 9: DeepSpeed's first step then",
        ),
        ({"zero_optimization": {"offload_optimizer": {"cpuadam_cores_perc": 3}}}, "perc is 3; write a number up to 1"),
        ({"csv_monitor": {"output_path": None}}, "csv_monitor.output_path is null; write a string"),
        ({"tensorboard": {"path": "x"}}, "'path' is not a key that DeepSpeed knows in tensorboard"),
        ({"wandb": {"project": 3}}, "wandb.project is 3; write a string"),
        ({"comet": {"samples_log_interval": "x"}}, 'samples_log_interval is "x"; write a whole number'),
        ({"timers": {"throughput": 3}}, "timers.throughput is 3; write an object"),
        ({"timers": {"throughput": {"on": True}}}, "'on' is not a key that DeepSpeed knows in timers.throughput"),
        ({"aio": {"block_size": 9}}, "aio is for offload to NVMe disks, which this package does not do; remove it"),
        ({"data_types": {"keep_in_fp32_modules": 3}}, "keep_in_fp32_modules is 3; write a list"),
        (
            {"tensor_parallel": {"dtype": "bf16"}},
            'tensor_parallel.dtype is "bf16": DeepSpeed expects a Python object',
        ),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["no.Such"]}},
            "holds 'no.Such', which cannot be imported",
        ),
        ({"nebula": {"enabled": True}}, "'nebula' is not a key that DeepSpeed knows"),
        ({"zero_optimization": {"cpu_offload_use_pin_memory": True}}, "offload_optimizer.pin_memory"),
        ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "none"}}}, "remove cpu_offload"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is given twice"),
    ],
)
def test_invalid_file_entries_are_refused_with_file_and_key(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=f"^{path}: .*{message}"):
        ds_config.apply_file(Config.create(deepspeed=path))


MASTERS, STATES = "bf16_master_weights_and_grads", "bf16_optimizer_states"
MASTERS_16 = "fp16_master_weights_and_grads"


@pytest.mark.parametrize(
    ("section", "flat", "message"),
    [
        (
            {"bf16": {MASTERS: True}},
            {"zero_stage": 2, "precision": "bf16"},
            f"{MASTERS} is true, which needs an optimizer on",
        ),
        (
            {"bf16": {MASTERS: True}},
            {"zero_stage": 0, "precision": "bf16"},
            f"{MASTERS} is true, which .* ZeRO partitions",
        ),
        ({"bf16": {MASTERS: True}}, {}, f"{MASTERS} is true, which needs precision='bf16', not 'fp32'"),
        ({"fp16": {MASTERS_16: True}}, {}, f"{MASTERS_16} is true, which needs precision='fp16', not 'fp32'"),
        ({"bf16": {STATES: True}}, {"precision": "bf16"}, f"{STATES} is true, which needs bf16.{MASTERS}. Set both"),
        (
            {"bf16": {STATES: True, MASTERS: True}},
            {"precision": "bf16", "offload": "optimizer"},
            "moments in fp32 here",
        ),
        ({"bf16": {STATES: True, MASTERS: True}}, {"precision": "bf16", "zero_stage": 2}, None),
        ({"bf16": {MASTERS: True}}, {"precision": "bf16", "zero_stage": 2, "offload": "optimizer"}, None),
    ],
)
def test_an_optimizer_in_16_bits_needs_what_deepspeed_needs_for_it(tmp_path, section, flat, message):
    config = Config.create(deepspeed=write(tmp_path, section), **flat)
    if message is None:
        ds_config.apply_file(config)
    else:
        with pytest.raises(ConfigError, match=f"^{tmp_path}/ds.json: .*{message}"):
            ds_config.apply_file(config)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (
            {"csv_monitor": {"enabled": True, "output_path": "{file}/logs"}},
            "csv_monitor.output_path: '{file}/logs/DeepSpeed",
        ),
        (
            {"csv_monitor": {"enabled": True, "output_path": "{dir}", "job_name": "file"}},
            "csv_monitor.output_path: '{file}'",
        ),
        ({"tensorboard": {"enabled": True, "output_path": "{file}"}}, "tensorboard.output_path: '{file}/"),
        ({"flops_profiler": {"enabled": True, "output_file": "{file}/x"}}, "flops_profiler.output_file: '{file}'"),
    ],
)
def test_a_monitors_unwritable_directory_is_refused_before_the_engine_starts(tmp_path, section, key):
    (tmp_path / "file").touch()
    filled = json.dumps(section).replace("{file}", f"{tmp_path}/file").replace("{dir}", str(tmp_path))
    path = write(tmp_path, filled)
    key = key.replace("{file}", f"{tmp_path}/file")
    with pytest.raises(ConfigError, match=f"^{path}: {key}.* cannot be written to: .*Write a directory"):
        run_checks.check_outputs(path)


def test_a_monitors_directory_is_created(tmp_path):
    section = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "new"), "job_name": "job"}}
    run_checks.check_outputs(write(tmp_path, section))
    assert (tmp_path / "new" / "job").is_dir()


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"classes": ["GPT2Blok"]}, "classes holds 'GPT2Blok', which the model does not have. It has, for instance: "),
        ({"names": ["transformer.h.99"]}, "names holds 'transformer.h.99', which the model does not have"),
        ({"name_suffixes": [".mlp", ".moe"]}, "name_suffixes holds '.moe', which the model does not have"),
        ({"classes": ["GPT2Block"], "names": ["transformer.h.0"], "name_suffixes": [".mlp"]}, None),
        ({"classes": ["transformers.models.gpt2.modeling_gpt2.GPT2MLP"]}, None),
    ],
)
def test_leaf_modules_that_a_model_does_not_have_are_refused(tmp_path, leaves, message):
    config = Config.create(deepspeed=write(tmp_path, {"zero_optimization": {"stage": 3, "leaf_module": leaves}}))
    if message is None:
        run_checks.check_leaf_modules(config.engine.deepspeed_file, lambda: build_model(config))
    else:
        with pytest.raises(ConfigError, match=f"zero_optimization.leaf_module.{message}"):
            run_checks.check_leaf_modules(config.engine.deepspeed_file, lambda: build_model(config))


def test_range_errors_name_the_files_key(tmp_path):
    path = write(tmp_path, {"zero_optimization": {"stage": 4}})
    with pytest.raises(ConfigError, match=rf"^{path}: zero_stage is 4.*zero_stage is zero_optimization.stage"):
        ds_config.apply_file(Config.create(deepspeed=path))


@pytest.mark.parametrize(
    ("stage", "precision", "dtype", "taken"),
    [(1, "bf16", "fp32", False), (0, "bf16", "fp32", False), (2, "bf16", "fp32", True), (1, "fp32", "fp32", True),
     (1, "bf16", "bf16", True)],
)  # fmt: skip
def test_gradients_accumulated_in_a_type_for_which_deepspeed_has_another_optimizer(
    tmp_path, stage, precision, dtype, taken
):
    path = write(tmp_path, {"data_types": {"grad_accum_dtype": dtype}})
    config = Config.create(zero_stage=stage, precision=precision, deepspeed=path)
    if taken:
        ds_config.apply_file(config)
    else:
        with pytest.raises(
            ConfigError, match=f"^{path}: data_types.grad_accum_dtype is 'fp32': with zero_stage={stage}"
        ):
            ds_config.apply_file(config)


def test_a_monitor_that_is_not_installed(tmp_path, monkeypatch):
    path = write(tmp_path, {"tensorboard": {"enabled": True}, "wandb": {"enabled": False}})
    monkeypatch.setattr(run_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=f"^{path}: tensorboard.enabled is true, but the package 'tensorboard' is not"
    ):
        ds_config.apply_file(Config.create(deepspeed=path))


def test_other_spellings_of_a_value_are_accepted(tmp_path):
    path = write(
        tmp_path,
        {
            "communication_data_type": "auto",
            "bfloat16": {"enabled": "auto"},
            "steps_per_print": None,
            "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": 5e7,
                "stage3_param_persistence_threshold": 1e5,
                "stage3_prefetch_bucket_size": "auto",
                "stage3_gather_fp16_weights_on_model_save": True,
                "cpu_offload": True,
                "cpu_offload_param": True,
            },
        },
    )
    config = ds_config.apply_file(Config.create(deepspeed=path))
    engine = config.engine
    assert (engine.zero_stage, engine.persistence_threshold, engine.bucket_size) == (3, 100_000, 50_000_000)
    assert (engine.offload, engine.pin_memory, engine.precision) == ("all", False, "fp32")
    built = ds_config.build(config)
    zero = built["zero_optimization"]
    assert isinstance(zero["reduce_bucket_size"], int) and zero["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": False,
    }
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert "auto" not in json.dumps(built)
