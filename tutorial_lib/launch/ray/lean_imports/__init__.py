"""Replacements for files that make Ray's processes slow to start: this directory is first on their import path.

``rfc3987_syntax.py`` hides an installed package that ``import ray`` loads but does not use. ``setup_worker.py``
replaces Ray's script of that name. Together they save seconds at every start, and Ray has no setting for either.
"""
