"""Empty stand-in for a package that Ray's processes would import without using it.

``import ray`` imports ``jsonschema``, which imports ``rfc3987_syntax`` if it is installed, as it is with Jupyter. At
import it builds a parser. That takes 0.85 of the 1.14 seconds of CPU time of ``import ray`` (median of three, on the
machine of ``tests/benchmarks/results.json``), in each Python process that Ray starts. Without the package,
``jsonschema`` skips one check (``format: iri``), which Ray never needs.
"""

raise ImportError("left out: slow to import, and Ray does not need it")
