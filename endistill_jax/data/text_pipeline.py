"""SeqIO and TensorFlow, imported in one place: where they are missing, whoever reads tasks says so in one line."""

from endistill_jax.extras import require

_READING = "reading a task's text"

tf = require("tensorflow", _READING)
seqio = require("seqio", _READING)
tfds = require("tensorflow_datasets", _READING)
