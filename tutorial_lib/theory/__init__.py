"""Cost of a run in theory: memory, traffic and time as plain arithmetic.

Modules name the sources of their formulas. Nothing here imports torch, a model library or another part of the package,
so predictions work anywhere, and never depend on the measurements they are compared with.
"""
