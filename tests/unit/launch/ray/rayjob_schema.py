"""JSON schema of a KubeRay RayJob (``ray.io/v1``), with the fields that our manifest may contain.

It was written by hand. KubeRay's own definition has 25,000 lines, in ``ray.io_rayjobs.yaml`` of its repository. Even if
unknown fields are refused, our manifests fit the definitions of KubeRay 1.5.1 to 1.7.0 (commit 59d663aeec13), but not
the one of 1.5.0, which lacks ``authOptions``. The name's pattern is the rule of KubeRay's ``ValidateRayJobMetadata``.
"""

from __future__ import annotations

from typing import Any

STRING, BOOLEAN, NUMBER = ({"type": name} for name in ("string", "boolean", "integer"))


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def record(*, required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """Return the schema of an object that has no other fields."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def mapping(values: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with names that the user chooses."""
    return {"type": "object", "additionalProperties": values}


def several(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


QUANTITY = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[0-9.]+([numkMGTPE]|[KMGTPE]i)?$"}]}
CONTAINER = record(
    required=("name",),
    name=STRING,
    image=STRING,
    resources=record(limits=mapping(QUANTITY), requests=mapping(QUANTITY)),
    volumeMounts=several(record(required=("name", "mountPath"), name=STRING, mountPath=STRING)),
)
VOLUME = record(
    required=("name",),
    name=STRING,
    persistentVolumeClaim=record(required=("claimName",), claimName=STRING),
    emptyDir=record(medium=STRING),
)
POD = record(spec=record(required=("containers",), containers=several(CONTAINER), volumes=several(VOLUME)))
PARAMETERS = mapping(STRING)
HEAD = record(required=("template",), rayStartParams=PARAMETERS, template=POD)
WORKERS = record(
    required=("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=STRING,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    rayStartParams=PARAMETERS,
    template=POD,
)
CLUSTER = record(
    required=("headGroupSpec",),
    rayVersion=STRING,
    authOptions=record(mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=BOOLEAN,
    headGroupSpec=HEAD,
    workerGroupSpecs=several(WORKERS),
)
JOB = record(
    entrypoint=STRING, shutdownAfterJobFinishes=BOOLEAN, ttlSecondsAfterFinished=NUMBER, rayClusterSpec=CLUSTER
)
RAY_JOB = record(
    required=("apiVersion", "kind", "metadata", "spec"),
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=record(required=("name",), name={"type": "string", "pattern": r"^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$"}),
    spec=JOB,
)
