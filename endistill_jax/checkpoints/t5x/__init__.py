"""T5X checkpoints, read and written without T5X."""

from endistill_jax.checkpoints.t5x.files import is_checkpoint
from endistill_jax.checkpoints.t5x.source import T5XSource, open_checkpoint
from endistill_jax.checkpoints.t5x.writing import save

__all__ = ["T5XSource", "is_checkpoint", "open_checkpoint", "save"]
