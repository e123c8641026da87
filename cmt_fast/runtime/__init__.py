"""The process: its machine, the ranks beside it, signals, progress for the person at the terminal."""
