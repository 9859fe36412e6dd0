"""What a notebook shows: claims, figures, source listings, progress.

Notebooks stay short because these functions take plain rows and dictionaries. Nothing here imports torch, an engine or
the trainer; the drawing library is imported when something is drawn.
"""
