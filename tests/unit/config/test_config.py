"""Combinations of settings that cannot run: they are refused before a process starts, and errors offer alternatives."""

import pytest

from tutorial_lib.config import PROFILES, Config, ConfigError, settings

AT_LOAD = {"engine": "trainer", "shard_at_load": True}


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"zero_stage": 5}, "zero_stage is 5; the largest possible value is 3"),
        ({"model": ""}, "model is empty; write a value"),
        ({"storage": " "}, "storage is empty; write a value"),
        ({"zero_stage": -1}, "zero_stage is -1; the smallest possible value is 0"),
        ({"zero_stage": 2, "offload": "all"}, "needs zero_stage=3, not 2"),
        ({"zero_stage": 0, "offload": "optimizer"}, "zero_stage=1, 2 or 3"),
        ({"precision": "fp16"}, "needs a GPU: on a CPU write precision='bf16' or 'fp32'"),
        ({"global_batch": 7}, "Write global_batch=6 or 8"),
        ({"global_batch": 1}, "Write global_batch=2 or 4"),
        ({"global_batch": 8, "micro_batch": 3}, r"micro_batch as one of \[1, 2, 4\]"),
        ({"name": "a/b"}, "cannot be a directory name"),
        ({"name": ".."}, "cannot be a directory name"),
        ({"name": ""}, "cannot be a directory name"),
        ({"name": "a" * 201}, "cannot be a directory name.* at most 200"),
        ({"seed": 2**32}, "seed is 4294967296; the largest possible value is 4294967295"),
        ({"beta1": 1.0}, "beta1 is 1.0; write a number below 1"),
        ({"beta2": -0.1}, "beta2 is -0.1; the smallest possible value is 0"),
        ({"zero_stge": 1}, "Did you mean 'zero_stage'"),
        ({"seq_length": "long"}, "seq_length is 'long', a str; write a value of type int"),
        ({"dp": True}, "dp is True, a bool"),
        ({"batching": "pack"}, "Write one of: max_length, longest, packed"),
        ({"engine": "torch"}, "single-process reference, but dp x tp = 2"),
        ({"engine": "torch", "dp": 1, "offload": "optimizer"}, "has no offload"),
        ({"engine": "torch", "dp": 1, "tp": 2}, "single-process reference, but dp x tp = 2. Write dp=1, tp=1"),
        ({"tp": 0}, "smallest possible value is 1"),
        ({"engine": "fsdp", "sharding": "ful_shard"}, "Did you mean 'full_shard'"),
        ({"engine": "fsdp", "sharding": "FSDP"}, "Write one of: full_shard, shard_grad_op, hybrid_shard, no_shard"),
        ({"sharding": "no_shard"}, "a setting of engine='fsdp', not of engine='deepspeed'"),
        ({"engine": "torch", "dp": 1, "wrap": "root"}, "a setting of engine='fsdp', not of engine='torch'"),
        ({"engine": "fsdp", "precision": "fp16", "device": "cuda"}, "has no loss scaling"),
        ({"engine": "fsdp", "deepspeed": "zero2"}, "reads no DeepSpeed file"),
        ({"engine": "fsdp", "offload": "optimizer"}, "write offload='all', or offload='none'"),
        ({"engine": "fsdp", "sharding": "no_shard", "offload": "all"}, r"\(DDP\) has no offload"),
        ({"engine": "fsdp", "sharding": "no_shard", "tp": 2}, "write tp=1, or sharding='full_shard'"),
        ({"engine": "fsdp", "sharding": "no_shard", "wrap": "root"}, "leave wrap out"),
        ({"engine": "fsdp", "shard_size": 2}, "belongs to sharding='hybrid_shard', not to 'full_shard'"),
        ({"engine": "fsdp", "sharding": "hybrid_shard"}, "dp=2 ranks into groups that share one copy, but 2 cannot"),
        ({"engine": "fsdp", "sharding": "hybrid_shard", "dp": 8}, r"shard_size=None does not divide dp=8"),
        ({"engine": "fsdp", "sharding": "hybrid_shard", "dp": 8, "shard_size": 3}, r"shard_size as one of \[2, 4\]"),
        ({"engine": "fsdp", "zero_stage": 1}, "zero_stage=1 would have no effect: it needs engine='deepspeed'"),
        ({"engine": "torch", "dp": 1, "zero_stage": 1}, "zero_stage=1 would have no effect"),
        ({"engine": "fsdp", "persistence_threshold": 5}, "it needs engine='deepspeed'. Set that too, or leave"),
        ({"engine": "fsdp", "bucket_size": 5}, "bucket_size=5 would have no effect"),
        ({"engine": "torch", "dp": 1, "pin_memory": True}, "it needs engine='deepspeed' or engine='fsdp'"),
        ({"zero_stage": 2, "persistence_threshold": 5}, "it needs zero_stage=3"),
        ({"pin_memory": True}, "pin_memory=True would have no effect: it needs offload"),
        ({"engine": "fsdp", "tp_plan": "plain"}, "it needs tp=2 or more"),
        ({"reduce_each": True}, "reduce_each=True is a setting of engine='fsdp', not of engine='deepspeed'"),
        ({"engine": "fsdp", "sharding": "no_shard", "reduce_each": True}, "holds full gradients in any case: leave"),
        ({"recompute": "selective"}, "it needs activation_checkpointing=True"),
        ({"engine": "trainer", "tp": 2}, "has no tensor parallelism, but tp=2.*DistributedType.MULTI_CPU.* Write tp=1"),
        ({"shard_at_load": True}, "a setting of engine='trainer', not of engine='deepspeed'"),
        ({**AT_LOAD, "deepspeed": "zero2"}, "would both split the model states"),
        ({**AT_LOAD, "dp": 1}, "has nothing to split with dp=1"),
        ({**AT_LOAD, "random_init": True}, "random_init=True reads none"),
        ({**AT_LOAD, "precision": "fp16", "device": "cuda"}, "fp16 is untested"),
        ({**AT_LOAD, "checkpoint_every": 2}, "cannot be combined with checkpoint_every=2.*cannot be checkpointed"),
        ({**AT_LOAD, "stop_after": 2}, "cannot be combined with stop_after=2.*Resuming is not supported"),
        ({**AT_LOAD, "launcher": "ray", "max_failures": 1}, "cannot be combined with max_failures=1"),
        ({**AT_LOAD, "keep_best": True}, "cannot be combined with keep_best=True"),
        ({"engine": "trainer", "precision": "fp16"}, "needs a GPU"),
        ({"engine": "trainer", "zero_stage": 2}, r"zero_stage=2 would .*a DeepSpeed file that states it \(deepspeed="),
        ({"engine": "trainer", "offload": "optimizer"}, "a DeepSpeed file that states it"),
        (
            {"engine": "trainer", "async_save": True},
            "async_save=True would have no effect: it needs engine='deepspeed'",
        ),
        ({"engine": "trainer", "sharding": "no_shard"}, "a setting of engine='fsdp', not of engine='trainer'"),
        ({"evaluate_every": "never"}, "write 'epoch', or a number of optimizer steps"),
        ({"evaluate_every": "0"}, "write 'epoch', or a number of optimizer steps"),
        ({"evaluate_every": "epoch", "evaluate": False}, "needs an evaluation"),
        ({"steps": 0}, "smallest possible value is 1"),
        ({"eps": 0.0}, "smallest possible value is 1e-30"),
        ({"steps": 5, "stop_after": 6}, "past the last step"),
        ({"steps": 3, "epochs": 2}, "steps=3 and epochs=2 both set the length of the run.*Leave one of them out"),
        ({"steps": 3, "epochs": 1}, "steps=3 and epochs=1 both set"),
        (
            {"steps": 3, "warmup_steps": 4},
            "warmup_steps=4 is longer than the whole run of 3.*Write warmup_steps=3",
        ),
        ({"learning_rate": -1.0}, "smallest possible value is 0.0"),
    ],
)
def test_settings_that_cannot_run_are_refused_with_an_alternative(flat, message):
    with pytest.raises(ConfigError, match=message):
        Config.create("cpu", **flat)


def test_the_length_of_a_run_is_stated_once_however_it_is_stated():
    for first, second in (({"epochs": 2}, {"steps": 3}), ({"steps": 3}, {"epochs": 2})):
        with pytest.raises(ConfigError, match="steps=3 and epochs=2 both set"):
            Config.create("cpu", **first).override(**second)
    with pytest.raises(ConfigError, match="warmup_steps=4 is longer than the whole run of 3"):
        Config.create("cpu", warmup_steps=4).override(steps=3)
    assert Config.create("cpu", steps=3).override(steps=None, epochs=2).run.epochs == 2
    assert Config.create("cpu", steps=3, warmup_steps=3).override(dp=1).optimizer.warmup_steps == 3


@pytest.mark.parametrize("flag", ["model", "dataset", "deepspeed", "storage"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 256, r"is 'x{40} \.\.\.', 256 bytes long.*each name in it 255\. Write a shorter one"),
        ("ä" * 128, "256 bytes long"),
        ("/x" * 2048, "4096 bytes long. A path has at most 4095"),
        ("a\0b", r"is 'a\\x00b', which contains a null byte"),
    ],
)
def test_impossible_file_names_are_refused(flag, name, message):
    with pytest.raises(ConfigError, match=f"^{flag} .*{message}"):
        Config.create("cpu", **{flag: name})


def test_shardings_are_known_in_upper_case_too():
    config = Config.create("cpu", engine="fsdp", sharding="SHARD_GRAD_OP", offload="all")
    assert config.engine.sharding == "shard_grad_op"
    assert Config.from_json(config.to_json()) == config


def test_unused_settings_of_a_profile_or_another_engine_are_no_error():
    assert Config.create("gpu", engine="torch").engine.pin_memory
    base = Config.create(zero_stage=1)
    alone = base.override(engine="torch", dp=1)
    assert (base.given, alone.given) == ({"zero_stage"}, {"zero_stage", "engine", "dp"})
    assert Config.from_json(alone.to_json()).given == {"max_examples", "max_eval_examples"}


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(ConfigError, match="cpu, gpu, cluster"):
        Config.create("tpu")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_configuration_survives_its_json(profile):
    config = Config.create(profile, freeze=("transformer.wte.*",), max_examples=3)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "not an object")])
def test_json_that_is_not_a_configuration(text, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_json(text)


def test_profiles_differ_in_values_only():
    names = [set(Config.create(profile).flat()) for profile in PROFILES]
    assert names[0] == names[1] == names[2] == set(settings())


@pytest.mark.parametrize(
    ("flat", "micro_batch", "accumulation"),
    [({}, 4, 1), ({"micro_batch": 1}, 1, 4), ({"dp": 4}, 2, 1), ({"dp": 4, "micro_batch": 1}, 1, 2)],
)
def test_global_batch_is_dp_times_micro_batch_times_accumulation(flat, micro_batch, accumulation):
    config = Config.create("cpu", global_batch=8, **flat)
    assert (config.micro_batch, config.accumulation) == (micro_batch, accumulation)
    assert config.parallel.dp * config.micro_batch * config.accumulation == 8
