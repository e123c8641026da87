"""What the Triton backends of the row-wise ops share."""
