"""AOT-compiles a training step for a topology and reads off its memory, traffic and cost."""
