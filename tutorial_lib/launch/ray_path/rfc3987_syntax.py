"""Takes the place of a package that Ray's processes would import and not use, see :mod:`tutorial_lib.launch.ray_train`.

``import ray`` imports ``jsonschema``, and that imports ``rfc3987_syntax`` where it is installed, as Jupyter has it do.
It parses a grammar of 1,000 rules at import: half a second or more, in each of the nine processes that a fit starts.
Without it ``jsonschema`` leaves out one check (``format: iri``), which Ray never asks for.
"""

raise ImportError("left out: slow to import, and Ray does not need it")
