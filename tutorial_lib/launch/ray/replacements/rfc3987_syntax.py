"""Empty stand-in for a package that Ray's processes would import and not use.

``import ray`` imports ``jsonschema``, and that imports ``rfc3987_syntax`` where it is installed, as Jupyter has it do.
It builds a parser at import: 0.85 of the 1.14 seconds of processor time that ``import ray`` takes (median of three, on
the machine of ``tests/benchmarks/results.json``), in each Python process that Ray starts. Without it ``jsonschema``
leaves out one check (``format: iri``), which Ray never asks for.
"""

raise ImportError("left out: slow to import, and Ray does not need it")
