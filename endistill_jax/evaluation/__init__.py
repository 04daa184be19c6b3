"""Held-out metrics: denoising loss with its references, and n-gram models to compare with."""
