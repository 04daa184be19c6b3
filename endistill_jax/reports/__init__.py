"""Result tables and the small files they go to."""
