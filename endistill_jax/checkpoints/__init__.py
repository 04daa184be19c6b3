"""Checkpoints: resumable training state, content fingerprints, Hugging Face folders."""
