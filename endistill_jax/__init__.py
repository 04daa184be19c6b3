"""Distil large T5 models into small, task-agnostic encoder-decoder students."""

__version__ = "0.1.0"
