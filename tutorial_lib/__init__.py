"""The tested package behind the notebooks: train one language model on many devices, and measure what that costs."""

__version__ = "0.1.0"
