"""Our objectives inside other training systems."""
