"""Measurements: memory held, bytes sent, and the speed of links.

These functions look at tensors, collectives and processes. They do not know the engine, so every engine is measured the
same way.
"""
