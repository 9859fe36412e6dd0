"""Checkpoints: a resume continues exactly or refuses, and never restarts silently.

One process and the torch engine; ``tests/distributed`` has the same for DeepSpeed's stages and several ranks.
"""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import MODELS, small_model
from tests.late_writes import late_writes, without_snapshot
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import CheckpointError, Writer, compatibility, directory, exporter, saver
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine.single import TorchEngine
from tutorial_lib.records import RunDirectory

ROOT = Path(__file__).parents[2]

STEPS = 7
"""Of epochs of three steps."""


def config(storage, **flat):
    settings = {"engine": "torch", "dp": 1, "launcher": "none", "steps": STEPS, "global_batch": 4, "seq_length": 32}
    settings |= {
        "max_examples": 13,
        "evaluate": False,
        "schedule": "constant",
        "warmup_steps": 2,
        "storage": str(storage),
    }
    return Config.create("cpu", **(settings | flat))


def make_checkpoint(run, step, **trainer):
    """The least that is a whole checkpoint, of a run that trains nothing."""
    path = checkpoint.directory_of(run, step)
    path.mkdir()
    (path / "trainer.json").write_text(json.dumps({"format": 2, "step": step, "record": {}} | trainer))
    listed = {"trainer.json": directory.digest(path / "trainer.json")}
    (path / checkpoint.MANIFEST).write_text(json.dumps({"format": 2, "files": listed}))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small GPT-2 with dropout: a resume that draws other random numbers gives other losses."""
    directory = tmp_path_factory.mktemp("models") / "dropout"
    small_model("gpt2", directory, **MODELS["gpt2"], embd_pdrop=0.1, resid_pdrop=0.1)
    return str(directory)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return launch.run(config(tmp_path_factory.mktemp("whole"), model=model))


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    """The same run, stopped after step 4, with a checkpoint at step 2 as well."""
    return launch.run(config(tmp_path_factory.mktemp("stopped"), model=model, stop_after=4, checkpoint_every=2))


@pytest.fixture
def halved(stopped, tmp_path):
    """A copy of it, to be damaged and continued."""
    run = replace(stopped, config=stopped.config.override(storage=str(tmp_path)))
    shutil.copytree(stopped.directory.path, run.directory.path)
    return run


def weights(run):
    return torch.load(checkpoint.latest(run.directory) / "engine" / "model.pt", weights_only=True)


def assert_same(run, whole):
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.rows] for r in (run, whole)]
    assert timeless[0] == timeless[1]
    assert all(tensor.equal(weights(whole)[name]) for name, tensor in weights(run).items())


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_stopped_after_any_step_continues_exactly(whole, model, tmp_path, stop):
    """Within an epoch, at its end (3 and 6), and across it."""
    first = launch.run(config(tmp_path, model=model, stop_after=stop))
    assert (first.result["status"], first.result["step"]) == ("stopped", stop)
    second = launch.run(config(tmp_path, model=model))
    assert (second.result["status"], second.result["resumed_from"]) == ("completed", stop)
    assert_same(second, whole)


def test_a_run_may_be_stopped_at_every_step(whole, model, tmp_path):
    for stop in (1, 2, 3, 4, 5, 6, None):
        run = launch.run(config(tmp_path, model=model, stop_after=stop))
    assert_same(run, whole)


def test_steps_may_be_raised_where_the_schedule_does_not_depend_on_them(whole, model, tmp_path):
    launch.run(config(tmp_path, model=model, steps=4))
    assert_same(launch.run(config(tmp_path, model=model)), whole)


def test_steps_may_not_be_raised_where_the_schedule_does_depend_on_them(model, tmp_path):
    launch.run(config(tmp_path, model=model, steps=2, schedule="linear"))
    with pytest.raises(ConfigError, match=r"steps was 2, now 4"):
        launch.run(config(tmp_path, model=model, steps=4, schedule="linear"))


def test_a_finished_run_started_again_trains_nothing(whole):
    again = launch.run(whole.config)
    assert (again.result["status"], again.result["step"]) == ("completed", STEPS)
    assert again.rows == whole.rows


def test_checkpoints_come_every_so_many_steps_and_at_the_end(halved):
    names = sorted(path.name for path in halved.directory.checkpoints.iterdir())
    assert names == ["step-00000002", "step-00000004"]


def test_every_setting_that_differs_is_named(halved):
    other = halved.config.override(
        seed=1,
        learning_rate=0.5,
        dataset="embedded/articles",
        global_batch=2,
        freeze=("*.wpe.weight",),
        stop_after=None,
    )
    with pytest.raises(ConfigError) as error:
        launch.run(other)
    for part in (
        "seed was 0, now 1",
        "learning_rate was 0.001, now 0.5",
        "dataset was 'embedded/news', now 'embedded/articles'",
        "global_batch was 4, now 2",
        "freeze was [], now ['*.wpe.weight']",
    ):
        assert part in str(error.value)
    assert "another name" in str(error.value)


def test_what_changes_no_update_may_change(halved, whole):
    """Recomputed activations drop the same elements: the random state of the first pass is kept."""
    free = {"activation_checkpointing": True, "checkpoint_every": 0, "stop_after": None}
    assert_same(launch.run(halved.config.override(**free)), whole)


def test_resume_never_refuses_a_run_that_exists(halved):
    with pytest.raises(ConfigError, match=r"step-00000004, and resume='never'.*another name"):
        launch.run(halved.config.override(resume="never", stop_after=None))
    assert [row["step"] for row in halved.directory.rows()] == [1, 2, 3, 4]


def test_resume_never_starts_a_new_run(model, tmp_path):
    assert launch.run(config(tmp_path, model=model, steps=1, resume="never")).result["status"] == "completed"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_the_step(path):
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


DAMAGE = [
    ("engine/model.pt", lambda path: path.unlink(), r"engine/model\.pt is missing"),
    ("engine/optimizer.pt", cut_short, r"engine/optimizer\.pt has \d+ bytes, but \d+ were written"),
    ("engine/model.pt", flip_a_bit, r"engine/model\.pt was altered"),
    ("rank-000.pt", flip_a_bit, r"rank-000\.pt was altered"),
    ("rank-000.pt", lambda path: path.unlink(), r"rank-000\.pt is missing"),
    ("trainer.json", change_the_step, r"trainer\.json was altered"),
    ("manifest.json", lambda path: path.unlink(), r"step-00000004 has no manifest\.json"),
    ("manifest.json", lambda path: path.write_text("{"), r"manifest\.json cannot be read"),
    ("manifest.json", lambda path: path.write_text('{"format": 2, "files": {}}'), "does not list trainer.json"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(halved, whole, name, damage, message):
    damaged = checkpoint.directory_of(halved.directory, 4)
    damage(damaged / name)
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    resumed = halved.config.override(stop_after=None, checkpoint_every=0)
    run = launch.run(resumed)
    assert run.result["resumed_from"] == 2
    (left_out,) = run.result["left_out"]
    assert left_out["checkpoint"] == "step-00000004"
    assert re.search(message, left_out["why"])
    assert_same(run, whole)
    assert {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()} == before, "nothing is deleted"


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(halved, whole):
    damaged = checkpoint.directory_of(halved.directory, 4)
    flip_a_bit(damaged / "engine" / "model.pt")
    assert_same(launch.run(halved.config.override(stop_after=None)), whole)
    checkpoint.verify(damaged)
    assert sorted(path.name for path in damaged.parent.iterdir()) == [f"step-{n:08d}" for n in (2, 4, 6, 7)]


@pytest.mark.parametrize(("name", "damage", "message"), [DAMAGE[1], DAMAGE[2], DAMAGE[6]])
def test_without_any_whole_checkpoint_nothing_restarts(halved, name, damage, message):
    for step in (2, 4):
        damage(checkpoint.directory_of(halved.directory, step) / name)
    with pytest.raises(CheckpointError, match=message.replace("00000004", "00000002")) as error:
        launch.run(halved.config.override(stop_after=None))
    assert "none of them is whole" in str(error.value) and "to begin again from step 0" in str(error.value)
    assert [row["step"] for row in halved.directory.rows()] == [1, 2, 3, 4]


def test_what_cannot_be_seen_at_a_glance_is_left_out_by_the_ranks_alone(halved):
    """Before processes start only sizes are looked at; that two agree is not required."""
    damaged = checkpoint.directory_of(halved.directory, 4)
    flip_a_bit(damaged / "engine" / "model.pt")
    assert checkpoint.latest(halved.directory) == damaged
    assert checkpoint.newest_whole(halved.directory)[0] == checkpoint.directory_of(halved.directory, 2)
    cut_short(damaged / "engine" / "model.pt")
    assert checkpoint.latest(halved.directory) == checkpoint.directory_of(halved.directory, 2)


def test_a_checkpoint_of_a_newer_format_is_refused_before_anything_starts(halved):
    """It may be whole: to go on from the one before it would throw steps away."""
    path = checkpoint.directory_of(halved.directory, 4)
    for name in ("trainer.json", "manifest.json"):
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | {"format": 99}))
        with pytest.raises(CheckpointError, match=r"written by a newer version, in format 99.*Update tutorial_lib"):
            checkpoint.read_trainer_state(path)
    with pytest.raises(CheckpointError, match=r"written by a newer version, in format 99.*Update tutorial_lib"):
        launch.preflight(halved.config)


def test_a_checkpoint_of_format_1_is_still_read(halved, whole):
    """It has no fingerprint of model and tokenizer, so that nothing is compared."""
    path = checkpoint.directory_of(halved.directory, 4)
    trainer = json.loads((path / "trainer.json").read_text())
    del trainer["identity"]
    (path / "trainer.json").write_text(json.dumps(trainer | {"format": 1}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = directory.digest(path / "trainer.json")
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    run = launch.run(halved.config.override(stop_after=None))
    assert (run.result["resumed_from"], run.result["left_out"]) == (4, [])
    assert_same(run, whole)


def test_an_interrupted_save_leaves_the_checkpoint_before_it(whole, model, tmp_path, monkeypatch):
    """It also leaves half a directory, under a name that nobody reads, and rows that are written again."""
    save, saves = TorchEngine.save, []

    def failing(self, directory, writer):
        save(self, directory, writer)
        saves.append(directory)
        if len(saves) == 2:
            raise KeyboardInterrupt

    settings = config(tmp_path, model=model, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "save", failing)
        with pytest.raises(KeyboardInterrupt):
            launch.run(settings)
    run = RunDirectory(settings.directory)
    partial, saved = sorted(path.name for path in run.checkpoints.iterdir())
    assert partial.startswith(".partial-step-00000004-") and saved == "step-00000002"
    assert checkpoint.latest(run).name == "step-00000002"
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    assert_same(launch.run(settings), whole)
    assert sorted(path.name for path in run.checkpoints.iterdir())[0] == "step-00000002"


def test_a_file_that_is_cut_short_before_the_save_ends_is_not_published(model, tmp_path, monkeypatch):
    """Its SHA-256 is taken as it is written: its size alone tells of another process."""
    save = TorchEngine.save

    def truncated(self, directory, writer):
        save(self, directory, writer)
        cut_short(directory / "model.pt")

    settings = config(tmp_path, model=model, checkpoint_every=2)
    monkeypatch.setattr(TorchEngine, "save", truncated)
    with pytest.raises(CheckpointError, match=r"engine/model\.pt has \d+ bytes, but \d+ were written.*invisible"):
        launch.run(settings)
    assert checkpoint.latest(RunDirectory(settings.directory)) is None


def test_what_is_damaged_is_not_opened(halved):
    path = checkpoint.latest(halved.directory)
    flip_a_bit(path / "engine" / "model.pt")
    with pytest.raises(CheckpointError, match=r"engine/model\.pt was altered"):
        checkpoint.open_whole(path)
    assert checkpoint.open_whole(path, verified=True).names


def entries(run, step):
    files = json.loads((checkpoint.directory_of(run.directory, step) / checkpoint.MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".pt")}


def test_what_is_written_while_training_goes_on_is_what_would_have_been_written_at_once(halved, whole, model, tmp_path):
    settings = config(tmp_path / "late", model=model, checkpoint_every=2, async_save=True)
    with late_writes() as newest:
        late = launch.run(settings)
    # Three files and the description at each of the steps 2, 4 and 6. The last save has no training to wait for.
    assert newest == [None] * 4 + ["step-00000002"] * 4 + ["step-00000004"] * 4, "visible before it was whole"
    assert_same(late, whole)
    for step in (2, 4):
        assert entries(late, step) == entries(halved, step)
        checkpoint.verify(checkpoint.directory_of(late.directory, step))
    for step in (4, 6, 7):
        shutil.rmtree(checkpoint.directory_of(late.directory, step))
    resumed = launch.run(settings)
    assert resumed.result["resumed_from"] == 2
    assert_same(resumed, whole)


def test_without_a_snapshot_it_would_not_be(halved, model, tmp_path):
    with late_writes(), without_snapshot():
        late = launch.run(config(tmp_path / "late", model=model, checkpoint_every=2, async_save=True))
    assert entries(late, 2)["engine/model.pt"] != entries(halved, 2)["engine/model.pt"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_is_reported_when_it_is_there_and_with_its_own_row(model, tmp_path, async_save):
    from tutorial_lib import trainer

    reported = []

    def report(path, row):
        checkpoint.verify(path)
        reported.append((path.name, row["step"]))

    settings = config(tmp_path, model=model, checkpoint_every=2, async_save=async_save)
    result = trainer.train(settings, on_checkpoint=report)
    assert reported == [(f"step-{step:08d}", step) for step in (2, 4, 6, 7)]
    run = RunDirectory(settings.directory)
    for saved, step in zip(result["saves"], (2, 4, 6, 7), strict=True):
        path = checkpoint.directory_of(run, step)
        sizes = [p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != checkpoint.MANIFEST]
        assert (saved["step"], saved["bytes"]) == (step, sum(sizes))
        assert 0 < saved["write_seconds"]
        assert 0 < saved["stall_seconds"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_an_error_and_the_checkpoint_before_it_stays(whole, model, tmp_path, async_save):
    """A limit on the size of files stands for the end of the disk."""
    settings = config(tmp_path, model=model, checkpoint_every=2, async_save=async_save)
    launch.run(settings.override(stop_after=2))
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, most))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/\.partial-step-00000004-\w+/engine/model\.pt'"):
            launch.run(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert checkpoint.latest(RunDirectory(settings.directory)).name == "step-00000002"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    assert_same(launch.run(settings), whole)


def test_an_error_of_a_file_bears_its_name_even_if_only_the_disk_tells(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: '.*/a\.pt'"):
        patch.setattr(os, "fsync", full)
        Writer(tmp_path).save({}, tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("number", "name", "refused", "expected"),
    [
        (errno.ENOSPC, "run/checkpoints/a.pt", None, r"No space left on device: .*/a\.pt; "),
        (errno.EACCES, "elsewhere/data.arrow", None, None),
        (errno.EIO, None, None, None),
        (errno.EIO, 7, None, None),
        (errno.EIO, None, "Read-only file system", r"\(Read-only file system; "),
        (errno.ENOSPC, "elsewhere/data.arrow", "No space left on device", r"\(No space left on device; "),
        (errno.ENOENT, "run/checkpoints/a.pt", "Read-only file system", None),
    ],
)
def test_only_an_error_of_the_runs_own_storage_is_told_as_one(tmp_path, monkeypatch, number, name, refused, expected):
    run = RunDirectory(tmp_path / "run")
    run.create()
    if refused:
        monkeypatch.setattr(compatibility, "_refusal", lambda directory: refused)
    error = OSError(number, os.strerror(number), str(tmp_path / name) if isinstance(name, str) else name)
    found = checkpoint.storage_failure(run, error)
    assert re.search(expected, str(found)) if expected else found is None


def test_another_model_is_named_too(halved):
    with pytest.raises(ConfigError, match=r"model was '.*/dropout', now 'embedded/gpt2'"):
        launch.run(halved.config.override(model="embedded/gpt2", stop_after=None))


SHAPES = {
    "another engine": (
        {"zero_stage": 2, "offload": "optimizer", "deepspeed": "zero2_cpu_offload"},
        {"engine": "fsdp"},
        {"engine": "fsdp", "dp": 2, "offload": "none", "deepspeed": None, "zero_stage": 3},
    ),
    "a stage that the DeepSpeed file does not name": (
        {"zero_stage": 2, "deepspeed": "zero2"},
        {"zero_stage": 3},
        {"zero_stage": 3, "deepspeed": None},
    ),
    "the same file on more ranks": (
        {"zero_stage": 2, "deepspeed": "zero2"},
        {"dp": 4},
        {"zero_stage": 2, "deepspeed": "zero2", "dp": 4},
    ),
    "another sharding": (
        {"engine": "fsdp", "dp": 4, "sharding": "hybrid_shard", "shard_size": 2},
        {"sharding": "full_shard"},
        {"sharding": "full_shard", "shard_size": None, "dp": 4},
    ),
    "one start's own settings are not taken over": (
        {"stop_after": 3, "steps": 9, "measure": True, "evaluate": False, "launcher": "none"},
        {"engine": "fsdp"},
        {"stop_after": None, "steps": 9, "measure": False, "evaluate": False, "launcher": "local"},
    ),
}


def saved_with(run, **flat):
    path = checkpoint.directory_of(RunDirectory(run), 3)
    path.mkdir(parents=True)
    flat = {name: value for name, value in Config.create("cpu", **flat).flat().items() if name != "storage"}
    (path / "trainer.json").write_text(json.dumps({"format": 1, "step": 3, "config": flat}))
    return path


@pytest.mark.parametrize("what", SHAPES)
def test_a_reshape_takes_over_what_fits_the_new_shape(tmp_path, what):
    saved, given, expected = SHAPES[what]
    reshaped = checkpoint.reshaped_config(saved_with(tmp_path / "old", **saved), {"name": "new", **given})
    assert {name: reshaped.flat()[name] for name in expected} == expected
    assert reshaped.directory == tmp_path / "new", "beside the old run"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "write its name"),
        ({"name": "new", "seed": 1, "global_batch": 4}, "seed was 0, now 1; global_batch was 8, now 4"),
        ({"name": "new", "launcher": "none"}, "train on the run as it is, in the shape that is wanted"),
        ({"name": "new", "stop_after": 5}, "stop_after cannot be set"),
        ({"name": "new", "engine": "torch"}, "Write dp=1, tp=1"),
        ({"name": "new", "zero_stge": 1}, "Did you mean 'zero_stage'"),
        ({"name": "old"}, "There is a run .*old already. Give the new run another name"),
    ],
)
def test_a_reshape_that_cannot_be_is_refused_before_anything_is_made(tmp_path, given, message):
    path = saved_with(tmp_path / "old")
    with pytest.raises(ConfigError, match=message):
        checkpoint.reshaped_config(path, given)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_reshape_leaves_no_run(halved, monkeypatch, error):
    """Nor does it keep what a killed one has left."""
    storage = halved.directory.path.parent
    (storage / ".new.reshaping" / "new").mkdir(parents=True)
    (storage / ".new.reshaping" / "new" / "half").write_text("")

    def interrupted(start):
        made = [path.name for path in RunDirectory(start.directory).checkpoints.iterdir()]
        assert made == ["step-00000004"] and not (start.directory / "half").exists()
        raise error

    monkeypatch.setattr(launch.runs, "run", interrupted)
    with pytest.raises(error):
        launch.reshape(halved.directory.path, name="new", activation_checkpointing=True)
    assert [path.name for path in storage.iterdir()] == [halved.directory.path.name]
    checkpoint.verify(checkpoint.latest(halved.directory))


def test_a_large_export_has_several_files_and_loads_the_same(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    path = checkpoint.latest(whole.directory)
    one, several = (checkpoint.export(path, tmp_path / size, size) for size in ("50GB", "60KB"))
    assert [p.name for p in one.glob("*.safetensors*")] == ["model.safetensors"]
    files = sorted(several.glob("model-*.safetensors"))
    assert len(files) > 2
    largest = max(tensor.nbytes for tensor in weights(whole).values())
    assert all(file.stat().st_size < max(60_000, largest) + 10_000 for file in files)
    assert json.loads((several / "model.safetensors.index.json").read_text())["weight_map"].keys() == {
        name for name in weights(whole) if name != "lm_head.weight"
    }
    inputs = torch.arange(24).view(2, 12)
    logits = []
    for export in (one, several):
        model, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
        assert not any(info.values()), info
        assert all(parameter.equal(weights(whole)[name]) for name, parameter in model.named_parameters())
        with torch.no_grad():
            logits.append(model.eval()(inputs).logits)
    assert logits[0].equal(logits[1])


def test_an_export_that_is_interrupted_leaves_nothing_that_looks_whole(whole, tmp_path, monkeypatch):
    path, target = checkpoint.latest(whole.directory), tmp_path / "exported"

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "_describe", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.export(path, target)
    assert [p.name for p in tmp_path.iterdir()] == [".exported.partial"]
    checkpoint.export(path, target)
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]


def test_a_size_that_is_none_is_refused(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"max_shard_size='large' is no size: write one such as '5GB'"):
        checkpoint.export(checkpoint.latest(whole.directory), tmp_path / "exported", "large")
    assert not list(tmp_path.iterdir())


_PEAKS = """
import json, sys, threading
from pathlib import Path
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import exporter

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024

def rise(source, target):
    done, seen = threading.Event(), [anonymous()]
    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    checkpoint.export(Path(source), Path(target))
    done.set()
    thread.join()
    return max(seen) - seen[0]

small, large, target = sys.argv[1:]
rise(small, target + "-small")  # imports, and what libraries keep
peaks = [rise(large, target + "-streamed")]
read = exporter._read
exporter._read = lambda *given: iter([tensor.clone() for tensor in read(*given)])
print(json.dumps([*peaks, rise(large, target + "-at-once")]))
"""


def test_an_export_holds_a_parameter_at_a_time(whole, model, tmp_path):
    """In a new process. To read all first is the control: it must show."""
    larger = tmp_path / "larger"
    shutil.copytree(model, larger)
    (larger / "model.safetensors").unlink()
    path = larger / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_embd": 128, "n_layer": 32}))
    run = launch.run(config(tmp_path, name="larger", model=str(larger), random_init=True, steps=1, global_batch=1))
    sizes = [tensor.nbytes for name, tensor in weights(run).items() if name != "lm_head.weight"]
    given = [str(checkpoint.latest(r.directory)) for r in (whole, run)]
    shown = subprocess.run(
        [sys.executable, "-c", _PEAKS, *given, str(tmp_path / "exported")], check=True, capture_output=True, cwd=ROOT
    )
    streamed, at_once = json.loads(shown.stdout.splitlines()[-1])
    assert sum(sizes) > 20 * max(sizes)
    assert streamed < 2 * max(sizes) + 4e6, f"{streamed} for parameters of at most {max(sizes)} bytes"
    assert at_once > 0.9 * sum(sizes)


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    class Engine:
        device = torch.device("cpu")

    draw()
    states = saver._random_states(Engine)
    torch.save(states, tmp_path / "states.pt")
    expected = draw()
    draw()
    saver._restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True), Engine)
    assert draw() == expected


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    run = RunDirectory(tmp_path)
    run.create()
    assert checkpoint.latest(run) is None
    for step in (9, 10, 100):
        make_checkpoint(run, step)
    (run.checkpoints / ".partial-step-00000200").mkdir()
    (run.checkpoints / "step-of-mine").mkdir()
    assert checkpoint.latest(run) == checkpoint.directory_of(run, 100)
    assert checkpoint.newest_whole(run) == (checkpoint.directory_of(run, 100), [])


@pytest.mark.parametrize(("what", "async_save"), [("loss", False), ("norm", False), ("norm", True)])
def test_a_run_that_diverges_stops_and_names_the_last_good_checkpoint(model, tmp_path, monkeypatch, what, async_save):
    from tutorial_lib import trainer

    if what == "loss":
        # The first update throws the weights out of range; the second step's loss shows it.
        settings, step = config(tmp_path, model=model, checkpoint_every=1, learning_rate=1e30, warmup_steps=0), 2
    else:
        settings, step = config(tmp_path, model=model, checkpoint_every=1, async_save=async_save), 3
        norms = iter([1.0, 1.0, float("nan")])
        update = TorchEngine.step
        monkeypatch.setattr(TorchEngine, "step", lambda self: update(self) and next(norms))
    with pytest.raises(trainer.NonFiniteLoss) as error:
        launch.run(settings)
    assert f"At step {step} the " in str(error.value)
    good = checkpoint.directory_of(RunDirectory(settings.directory), step - 1)
    assert f"last good checkpoint is {good}." in str(error.value)
    assert checkpoint.latest(RunDirectory(settings.directory)) == good
    checkpoint.verify(good)
    assert len(RunDirectory(settings.directory).rows()) == step - 1


def test_divergence_before_any_checkpoint_says_so(model, tmp_path):
    from tutorial_lib import trainer

    with pytest.raises(trainer.NonFiniteLoss, match="No checkpoint was saved before"):
        launch.run(config(tmp_path, model=model, learning_rate=1e30, warmup_steps=0))
