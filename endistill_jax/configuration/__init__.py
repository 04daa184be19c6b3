"""From gin files and the command line to one configured job; nothing here is needed by plain Python callers."""
