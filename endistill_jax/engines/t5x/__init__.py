"""Distillation inside T5X."""
