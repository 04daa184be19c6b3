"""Hugging Face T5 folders: opened as a source of tensors, and written so that `transformers` loads them."""

from endistill_jax.checkpoints.huggingface.reading import download, load, open_folder
from endistill_jax.checkpoints.huggingface.writing import save

__all__ = ["download", "load", "open_folder", "save"]
