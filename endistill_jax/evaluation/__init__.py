"""Held-out figures: denoising loss with its references, and n-gram models to compare with."""
