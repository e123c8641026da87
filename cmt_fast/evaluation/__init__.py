"""How good samples are: distances, reference statistics, judges, and a world with a known answer."""
