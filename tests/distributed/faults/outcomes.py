"""Outcomes that several faults share, as the tests' marks and ``docs/faults.md`` state them."""

AGAIN = "stops with an error that names the rank; the same command resumes from the newest intact checkpoint"
BACK = "resumes from the newest intact checkpoint before it, and says which was left out and why"
REFUSED = "refused before a process starts, with the cause and what to do"
