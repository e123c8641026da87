"""A run looked at from outside while it trains: it reads files of the run, writes none of them and needs no torch."""
