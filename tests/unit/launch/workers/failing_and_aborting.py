"""Failing and aborting worker: rank 0 writes an error of its own, and then aborts, after rank 1 has failed."""

import sys

from tests.unit.launch.workers.aborting import abort, fail_on_rank_1, run_of


def main(configs_file: str, _rendezvous: str) -> None:
    run = run_of(configs_file)
    fail_on_rank_1(run)
    (run.logs / "rank-001.error.json").unlink()
    run.write_error(0, ValueError("its own"))
    abort()


if __name__ == "__main__":
    main(*sys.argv[1:])
