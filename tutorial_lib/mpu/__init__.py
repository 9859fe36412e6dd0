"""The rank grid: data-parallel and tensor-parallel process groups, and the collectives that every room uses."""

from tutorial_lib.mpu.topology import ModelParallelUnit, Topology, device_mesh

__all__ = ["ModelParallelUnit", "Topology", "device_mesh"]
