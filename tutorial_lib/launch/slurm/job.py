"""SLURM job of a run: submit it, and follow it through the queue and through training to its end."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch.errors import WorkerError, first_error, next_start
from tutorial_lib.launch.runs import Interrupted, Run
from tutorial_lib.launch.watch import POLL_SECONDS, OnRows, Watcher, stop_on_signal
from tutorial_lib.records import RunDirectory

ASK_SECONDS = 3.0
"""Seconds between queries to SLURM's controller, which serves all users."""

_ANSWER_SECONDS = 300.0
"""Seconds to keep asking a controller that does not answer."""

_RESULT_SECONDS = 15.0
"""Seconds to wait after a job's end for its result to arrive through a network file system."""

_STOPPING_MESSAGE = (
    "Stopping: the job saves after its current step and ends; if it has not started, it leaves the queue. Interrupt "
    "again to stop watching the job."
)

_ACTIVE = frozenset(
    "PENDING CONFIGURING RUNNING COMPLETING SUSPENDED STOPPED REQUEUED REQUEUE_HOLD REQUEUE_FED RESIZING SIGNALING "
    "STAGE_OUT SPECIAL_EXIT RESV_DEL_HOLD".split()
)

_ENDS = {
    "TIMEOUT": "it reached its time limit before it had saved: raise --grace",
    "OUT_OF_MEMORY": "a node had too little memory for it",
    "NODE_FAIL": "a node failed",
    "CANCELLED": "it was cancelled",
    "PREEMPTED": "a higher-priority job took its nodes",
    "FAILED": "it failed",
}


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's state according to ``squeue``."""

    name: str
    """Name such as ``RUNNING``; empty if SLURM no longer knows the job."""
    reason: str = ""
    nodes: str = ""

    @property
    def is_active(self) -> bool:
        return self.name in _ACTIVE

    def __str__(self) -> str:
        if self.nodes:
            return f"{self.name} on {self.nodes}"
        return f"{self.name} ({self.reason})" if self.reason not in ("", "None") else self.name


def submit_and_follow(script: str, config: Config, on_rows: OnRows | None = None) -> Run:
    """Submit a batch script, wait for the job's end through all its requeues, and return its run.

    The first SIGINT, SIGTERM or SIGUSR1 asks the run to save and end. A second SIGINT ends only this function. A second
    SIGTERM or SIGUSR1 is handled as before the call, which usually ends the process.

    Args:
        script: text from :func:`write_script`.
        config: configuration of the run in the script.
        on_rows: called with new metrics rows.

    Raises:
        ConfigError: there is no SLURM here, it refuses the job, or a rank refused the configuration.
        WorkerError: the job failed; the message is the failing rank's own traceback, if there is one.
        Interrupted: a signal came before the job had started, or Ctrl-C was pressed twice.
    """
    directory = RunDirectory(config.directory)
    signals: list[int] = []
    watched = Watcher([directory], on_rows, signals, _STOPPING_MESSAGE)
    submitted = directory.result_version()
    directory.clear_errors()  # left by an earlier job
    job = _submit(script)
    log = Path.cwd() / f"slurm-{config.run.name}-{job}.out"
    print(f"job {job}: submitted; its output is in {log}", file=sys.stderr, flush=True)
    try:
        with stop_on_signal(watched):
            state, has_run, requeued = _follow(job, watched, directory)
    except KeyboardInterrupt:  # the second one; stop_on_signal has withdrawn the request of the first
        _ask_to_stop(directory, signals)
        with suppress(KeyboardInterrupt):  # perhaps a third one
            _leave_queue(job)
        raise Interrupted(
            f"job {job} is no longer watched. It was asked to save and end, or to leave the queue if it had not "
            f"started. `squeue --jobs={job}` shows whether it is still there, and `scancel {job}` cancels it.",
            [],
        ) from None
    # Only a job that was cancelled while it waited for its next slot ends with the result of an earlier one.
    old = (None, submitted) if state.name == "CANCELLED" else (None, submitted, requeued)
    end = time.monotonic() + _RESULT_SECONDS
    while directory.result_version() in old and state.name == "COMPLETED" and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    if directory.result_version() not in old:
        return Run(config, directory.result(), directory.rows())
    if signals and state.name == "CANCELLED" and not has_run:
        raise Interrupted(f"job {job} was cancelled before it started; no step was run.", [])
    raise _failure(job, state, directory, log)


def _follow(job: str, watched: Watcher, directory: RunDirectory) -> tuple[JobState, bool, tuple[int, ...] | None]:
    """Wait for a job's end, through all its requeues.

    Returns:
        Its final state; whether it was seen running; and the version of its result when it was last requeued, or None
        if it never was.
    """
    queue, before, requeued, has_run = _Queue(job), "PENDING", None, False
    while (state := queue.look()).is_active:
        has_run = has_run or state.name == "RUNNING"
        if state.name == "PENDING" and before != "PENDING":
            requeued = directory.result_version()
        before = state.name
        if watched.signals and state.name == "PENDING":
            _leave_queue(job)
        elif watched.signals and not directory.stop_file.exists():  # each start of the run deletes earlier requests
            _ask_to_stop(directory, watched.signals)
        watched.poll()
        time.sleep(POLL_SECONDS)
    watched.poll()
    return state, has_run, requeued


def _ask_to_stop(directory: RunDirectory, signals: list[int]) -> None:
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.stop_file.write_text(f"signals {signals} at {time.time()}\n")


def _leave_queue(job: str) -> None:
    """Cancel a job that waits in the queue. Leave it alone if it runs, or if SLURM does not answer."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", "--state=PENDING", job], capture_output=True, timeout=120)


def _submit(script: str) -> str:
    """Submit a batch script, and return the job's id."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise ConfigError(
            "There is no sbatch here, so nothing can be submitted. Run this on a login node of the cluster, or write "
            "--output FILE instead of --submit, and submit the file there."
        ) from None
    if done.returncode:
        raise ConfigError(f"SLURM refuses the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


class _Queue:
    """State of one job, read from ``squeue`` every few seconds.

    Attributes:
        state: the last answer.
    """

    def __init__(self, job: str) -> None:
        self.job, self.state = job, JobState("PENDING", "submitted")
        self._asked, self._answered = float("-inf"), time.monotonic()

    def look(self) -> JobState:
        """Return the job's state, at most a few seconds old, and tell the user if it has changed.

        Raises:
            WorkerError: the controller has not answered for minutes.
        """
        if time.monotonic() - self._asked < ASK_SECONDS:
            return self.state
        self._asked = time.monotonic()
        new = self._ask()
        if new.is_active and str(new) != str(self.state):
            print(f"job {self.job}: {new}", file=sys.stderr, flush=True)
        self.state = new
        return new

    def _ask(self) -> JobState:
        squeue = ["squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T|%r|%N"]
        try:
            done = subprocess.run(squeue, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(squeue, 1, "", "no answer within 60 s")
        if done.returncode and "Invalid job id" not in done.stderr:
            if time.monotonic() - self._answered > _ANSWER_SECONDS:
                raise WorkerError(
                    f"SLURM's controller has not answered for {_ANSWER_SECONDS:.0f} s: {done.stderr.strip()}. Job "
                    f"{self.job} continues, but is no longer watched; `squeue --jobs={self.job}` will show it."
                )
            return self.state
        self._answered = time.monotonic()
        first = done.stdout.strip().partition("\n")[0]
        return JobState(*first.split("|")) if first else JobState("")


def _failure(job: str, state: JobState, directory: RunDirectory, log: Path) -> Exception:
    """Return the error of a job without a result: a rank's own error, or the errors in the job's log."""
    why = _ENDS.get(state.name, "it left no result")
    return first_error(
        [directory],
        f"Job {job} ended as {state.name or 'unknown'}: {why}. {next_start([directory])}\n{_cause(job, log)}",
    )


def _cause(job: str, log: Path, lines: int = 20) -> str:
    """Return the errors that a job's last start printed, each once, or the end of its log."""
    if not log.is_file():
        return f"It has no log: {log} does not exist."
    text = log.read_text(encoding="utf-8", errors="replace")
    of_last_start = text[max(text.rfind(f"job {job}.", 0, text.rfind("rendezvous at")), 0) :].splitlines()
    errors = list(dict.fromkeys(line for line in of_last_start if line.startswith("error: ")))
    return "\n".join(errors or [f"The end of {log}:", *of_last_start[-lines:]])
