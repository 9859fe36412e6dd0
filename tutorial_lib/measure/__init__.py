"""Measurements of a run: memory held, bytes sent, tokens per second.

These functions look at tensors, collectives and records. They do not know the engine, so every engine is measured the
same way.
"""
