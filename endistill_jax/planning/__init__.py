"""What a training step costs on chips that are not here: compiled ahead of time, its memory and traffic read off."""
