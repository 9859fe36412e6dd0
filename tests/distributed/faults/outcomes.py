"""Outcomes that several faults share, as the tests' marks and ``docs/faults.md`` state them."""

RESUMES = "stops with an error that names the rank; the same command resumes from the newest intact checkpoint"
FALLS_BACK = "resumes from the newest intact checkpoint, and names each one it skipped, with the reason"
REFUSED = "refused before a process starts; the error says why and what to do"
