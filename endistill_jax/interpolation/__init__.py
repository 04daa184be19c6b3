"""Interpolated distillation: assistants between a large teacher and a small student."""
