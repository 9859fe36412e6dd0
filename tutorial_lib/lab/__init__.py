"""Notebook tools: claims, figures, source listings, progress and exercises.

Notebooks stay short because these functions take plain rows and dictionaries. Nothing here imports an engine or the
trainer, and the drawing library is only imported when something is drawn.
"""
