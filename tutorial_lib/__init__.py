"""Tested code behind the notebooks: train a language model on many devices, and measure memory, traffic and speed."""

__version__ = "0.1.0"
