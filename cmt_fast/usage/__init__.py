"""What was used: hours and energy, measured, over ranks and restarts."""
