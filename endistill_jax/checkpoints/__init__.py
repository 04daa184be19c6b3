"""Checkpoints: resumable training state, content fingerprints, Hugging Face and T5X formats."""
