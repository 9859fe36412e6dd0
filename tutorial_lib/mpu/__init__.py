"""Rank grid: data-parallel and tensor-parallel process groups, and the collectives that every package uses."""

from tutorial_lib.mpu.topology import ModelParallelUnit, Topology, device_mesh

__all__ = ["ModelParallelUnit", "Topology", "device_mesh"]
