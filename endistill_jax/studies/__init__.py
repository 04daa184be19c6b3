"""Ways to train a student, compared over seeds."""
