"""The Hugging Face Trainer as the training loop of a run: same data, same records, same checkpoints' safety.

``arguments`` turns a run's settings into ``TrainingArguments``, ``trainer`` is transformers' ``Trainer`` with this
package's data order and optimizer, and ``run`` keeps the run's records while that ``Trainer`` trains.
"""

from tutorial_lib.trainer.huggingface.run import HuggingFaceRun

__all__ = ["HuggingFaceRun"]
