"""SLURM: write a batch script for a run, or submit it and follow the job to its end.

The script starts one ``torchrun`` per node. Shortly before the time limit the run saves and the job requeues itself;
its next start resumes the run.
"""

from tutorial_lib.launch.slurm.job import submit_and_follow
from tutorial_lib.launch.slurm.script import Allocation, write_script

__all__ = ["Allocation", "submit_and_follow", "write_script"]
