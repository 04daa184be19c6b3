"""Text generation with any decoder."""
