"""Site directory for packages that this Python lacks, unpacked from the wheels that ``pack.py`` collected."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import zipfile
from pathlib import Path

MODULES = {
    "deepspeed": "deepspeed",
    "hjson": "hjson",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection",
    "datasets": "datasets",
    "dill": "dill",
    "multiprocess": "multiprocess",
    "torchdata": "torchdata",
}
"""Packages that may come as wheels, and the module that shows whether each is already installed."""

ALSO_USED = (
    "torch transformers tokenizers accelerate safetensors numpy pyarrow psutil filelock ninja msgpack py-cpuinfo "
    "einops nvidia-ml-py huggingface-hub triton"
).split()


def unpack_missing(wheels: Path, site: Path) -> dict[str, str]:
    """Unpack the wheel of every package that cannot be found, and return where each came from.

    Installed packages stay, whatever their version. A second version of a package on which others rely would do more
    harm than one unexpected version, which the report names.
    """
    site.mkdir(parents=True, exist_ok=True)
    origins = {}
    for package, module in MODULES.items():
        if importlib.util.find_spec(module) is not None:
            origins[package] = "was already installed"
        elif found := sorted(wheels.glob(f"{package.replace('-', '_')}-*.whl")):
            with zipfile.ZipFile(found[-1]) as wheel:
                wheel.extractall(site)
            origins[package] = found[-1].name
        else:
            origins[package] = "missing, and there is no wheel for it"
    return origins


def versions(site: Path | None = None) -> dict[str, str | None]:
    """Return the version of each package that matters, or None if it is not installed."""
    extra = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions(path=[str(site)])}
    found: dict[str, str | None] = {}
    for package in [*ALSO_USED, *MODULES]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = extra.get(package) or extra.get(package.replace("-", "_"))
    return found
