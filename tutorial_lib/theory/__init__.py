"""Cost of a run in theory: memory, traffic and time as plain arithmetic.

Every function names the paper that its formula comes from. Nothing here imports torch, a model library or another
part of the package, so predictions work anywhere, and never depend on the measurements they are compared with.
"""
