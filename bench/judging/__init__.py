"""What judging costs at the size of published figures."""
