"""Hugging Face Trainer as a run's training loop: the same data and records, and equally safe checkpoints.

``arguments`` turns a run's settings into ``TrainingArguments``, ``trainer`` is transformers' ``Trainer`` with this
package's data order and optimizer, and ``run`` keeps the run's records while that ``Trainer`` trains.
"""

from tutorial_lib.trainer.huggingface.run import HuggingFaceRun

__all__ = ["HuggingFaceRun"]
