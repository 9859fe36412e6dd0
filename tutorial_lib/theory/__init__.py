"""What a run should cost: memory, traffic and time as plain arithmetic.

Every function states the paper that its formula comes from. Nothing here imports torch, a model library or another
part of the package, so a prediction can be made anywhere and never depends on what it is compared with.
"""
