"""Replacements for files that make Ray's processes slow to start: this directory comes first on their import path.

``rfc3987_syntax.py`` hides an installed package that ``import ray`` loads and does not use. ``setup_worker.py`` is run
in place of Ray's script of that name. Together they save seconds in every start, and Ray offers no setting for either.
"""
