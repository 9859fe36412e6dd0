"""What a run did cost: bytes held, bytes sent, tokens per second.

These functions look at tensors, collectives and records; they know no engine, so that every engine is measured alike.
"""
