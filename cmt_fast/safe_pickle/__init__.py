"""Foreign pickles, read without running them."""
