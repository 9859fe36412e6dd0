"""Manifests that start a Ray cluster: they fit the schemas of Ray and KubeRay, and train the right run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from tests.unit.launch.ray.rayjob_schema import RAY_JOB
from tutorial_lib import cli

ON_GPUS = ["ray", "--nodes", "2", "--gpus-per-node", "4", "--tp", "2", "--name", "news_A", "--storage", "/shared/runs"]
ON_CPUS = ["ray", "--profile", "cpu", "--nodes", "2", "--ranks-per-node", "2"]
EXPERIMENT = ["ray", "--experiment", "3Z-8G2N"]  # its name begins with a digit
NAMED_NO = [*ON_CPUS, "--name", "no"]  # without quotes, this means false in YAML


def written(capsys: pytest.CaptureFixture[str], arguments: list[str], kind: str) -> tuple[str, dict[str, Any]]:
    """Return a manifest as text, and parsed as YAML."""
    assert cli.main([*arguments, "--format", kind]) == cli.DONE
    text = capsys.readouterr().out
    return text, yaml.safe_load(text)


@pytest.mark.parametrize("arguments", [ON_GPUS, ON_CPUS, NAMED_NO], ids=["gpu", "cpu", "no"])
def test_cluster_yaml_fits_rays_schema(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    text, content = written(capsys, arguments, "cluster-yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"image": "of my own"}, schema)
    assert text.startswith("# Not tested on any")
    worker = content["available_node_types"]["worker"]
    assert (worker["min_workers"], worker["max_workers"], content["max_workers"]) == (2, 2, 2)
    assert worker["resources"] == ({"CPU": 32, "GPU": 4} if arguments is ON_GPUS else {"CPU": 2, "GPU": 0})


@pytest.mark.parametrize("arguments", [ON_GPUS, ON_CPUS, EXPERIMENT, NAMED_NO], ids=["gpu", "cpu", "digit", "no"])
def test_a_ray_job_fits_kuberays_schema(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    _, job = written(capsys, arguments, "rayjob")
    jsonschema.validate(job, RAY_JOB)
    misspelled = json.loads(json.dumps(job).replace('"mountPath"', '"path"'))
    with pytest.raises(jsonschema.ValidationError, match=r"'path' was unexpected|'mountPath' is a required property"):
        jsonschema.validate(misspelled, RAY_JOB)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        jsonschema.validate(job, RAY_JOB)


def test_a_ray_job_asks_for_the_nodes_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    text, job = written(capsys, ON_GPUS, "rayjob")
    assert text.startswith("# Not tested on any")
    assert job["metadata"] == {"name": "news-a"}
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__ and cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    for pod in (cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["volumeMounts"][0]["mountPath"] == "/shared/runs"
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "32", "nvidia.com/gpu": "4"}


def test_on_cpus_no_gpu_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = written(capsys, ON_CPUS, "rayjob")
    assert "nvidia" not in text


def test_the_job_trains_what_was_configured(capsys: pytest.CaptureFixture[str]) -> None:
    _, job = written(capsys, [*ON_GPUS, "--zero-stage", "1", "--freeze", "*.h.0.*"], "rayjob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "tutorial_lib", "train"]
    for flag, value in {
        "--launcher": "ray",
        "--dp": "4",
        "--tp": "2",
        "--zero-stage": "1",
        "--freeze": "*.h.0.*",
    }.items():
        assert words[words.index(flag) + 1] == value, flag


def test_the_command_for_a_clouds_cluster_trains_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*ON_GPUS[:-1], "/shared/my runs", "--freeze", "*.h.0.*", "it's", "--seq-length", "64"]
    _, job = written(capsys, given, "rayjob")
    text, content = written(capsys, given, "cluster-yaml")
    (command,) = re.findall(r"(ray exec .*?)\n#    The same command", text, re.DOTALL)
    *start, remote = shlex.split(command.replace("\n#", "\n"))
    assert start == ["ray", "exec", "cluster.yaml"]
    words = shlex.split(job["spec"]["entrypoint"])
    assert shlex.split(remote.replace("\\\n", "")) == ["RAY_ADDRESS=auto", "RAY_AUTH_MODE=token", *words]
    mount, _ = content["docker"]["run_options"]  # Ray joins these options with spaces, for a shell
    assert shlex.split(mount)[-1].endswith(">:/shared/my runs")


@pytest.mark.parametrize("kind", ["cluster-yaml", "rayjob"])
def test_a_line_break_in_the_given_command_stays_in_its_comment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    _, expected = written(capsys, ON_CPUS, kind)
    monkeypatch.setattr("sys.argv", ["tutorial_lib", *ON_CPUS, "--output", "my\nnodes: 7"])
    text, content = written(capsys, ON_CPUS, kind)
    assert content == expected and "\n# nodes: 7'" in text


def test_an_elastic_run_keeps_as_many_nodes_as_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    _, content = written(capsys, [*ON_GPUS, "--min-dp", "2"], "cluster-yaml")
    assert content["available_node_types"]["worker"]["min_workers"] == 1


def test_values_that_only_the_user_knows_are_placeholders(capsys: pytest.CaptureFixture[str]) -> None:
    """No image, account or claim is invented."""
    for kind, least in (("cluster-yaml", 8), ("rayjob", 2)):
        text, content = written(capsys, ON_GPUS, kind)
        assert len(re.findall("<FILL IN: ", text)) >= least
        images = re.findall(r'"(?:image)": "([^"]*)"', json.dumps(content))
        assert images and all(image.startswith("<FILL IN: ") for image in images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ray"], "Write --gpus-per-node N"),
        ([*ON_GPUS, "--dp", "2"], "Leave dp out: it follows"),
        (["ray", "--gpus-per-node", "4", "--tp", "8", "--dp", "1"], r"Write tp as one of \[1, 2, 4\]"),
        (
            ["ray", "--nodes", "2", "--gpus-per-node", "3", "--tp", "2", "--global-batch", "12"],
            "a tensor-parallel group would span nodes",
        ),
        ([*ON_GPUS, "--launcher", "none"], "does not run on a Ray cluster. Leave launcher out"),
        ([*ON_CPUS, "--cpus-per-rank", "0"], "cpus_per_rank is 0"),
        ([*ON_CPUS, "--storage", "/s/my\nruns"], r"'/s/my\\nruns' contains a line break"),
    ],
)
def test_conflicting_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([*arguments, "--format", "rayjob"]) == cli.BAD_CONFIGURATION
    assert re.search(message, capsys.readouterr().err)
