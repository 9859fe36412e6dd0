"""Wheels for a GPU machine without a network: ``python tests/gpu/pack.py`` collects them in ``build/gpu-wheels``.

The machine is expected to have Python 3.12, torch, transformers, pyarrow and most dependencies of the other packages.
Missing ones take less than 8 MiB and are copied along with the checkout. DeepSpeed becomes a wheel without compiled
operators. Those that a run needs are compiled on the GPU machine, at first use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "build" / "gpu-wheels"
MISSING = (
    "hjson pydantic pydantic-core annotated-types typing-inspection "  # for DeepSpeed
    "datasets dill multiprocess torchdata"
).split()
PLATFORMS = "manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64".split()
LIMIT_BYTES = 60 * 2**20
"""Limit on the size of all wheels, so that they can be copied along with the checkout."""


def pinned_versions() -> dict[str, str]:
    """Return the version of every package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def pip(*arguments: str, **environment: str) -> None:
    """Run this interpreter's pip."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env={**os.environ, **environment})


def collect(target: Path) -> list[Path]:
    """Replace all wheels in a directory, and return the new ones.

    Raises:
        SystemExit: they are too large to be copied along with the checkout.
    """
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.whl"):
        old.unlink()
    versions = pinned_versions()
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip(
        "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp",
        *platforms, "--dest", str(target), *(f"{name}=={versions[name]}" for name in MISSING),
    )  # fmt: skip
    pip(
        "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", "deepspeed",
        "--wheel-dir", str(target), f"deepspeed=={versions['deepspeed']}", DS_BUILD_OPS="0",
    )  # fmt: skip
    wheels = sorted(target.glob("*.whl"))
    if (size := sum(wheel.stat().st_size for wheel in wheels)) > LIMIT_BYTES:
        raise SystemExit(f"The wheels take {size / 2**20:.0f} MiB, more than the limit of {LIMIT_BYTES >> 20} MiB.")
    return wheels


if __name__ == "__main__":
    for wheel in collect(WHEELS):
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
