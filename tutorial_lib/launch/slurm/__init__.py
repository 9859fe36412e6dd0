"""SLURM: a batch script for a run, and a submitted job followed to its end.

The script starts one ``torchrun`` per node, saves and queues itself again before its time limit, and then resumes the
run of the same name.
"""

from tutorial_lib.launch.slurm.job import submit_and_follow
from tutorial_lib.launch.slurm.script import Allocation, write_script

__all__ = ["Allocation", "submit_and_follow", "write_script"]
