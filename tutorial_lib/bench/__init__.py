"""Benchmark matrices: the same training in several variants, each row in its own processes, compared in one table.

If a row fails, the table says so, and the next row runs. Results are saved after every row, so that a matrix can be
interrupted and continued.
"""

from tutorial_lib.bench.compare import Comparison, compare
from tutorial_lib.bench.experiments import EXPERIMENTS
from tutorial_lib.bench.matrix import Matrix, run_matrix
from tutorial_lib.bench.progress import MatrixProgress
from tutorial_lib.bench.record import RowRecord

__all__ = ["EXPERIMENTS", "Comparison", "Matrix", "MatrixProgress", "RowRecord", "compare", "run_matrix"]
