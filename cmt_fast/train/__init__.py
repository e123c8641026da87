"""The training loop of every stage: its batches, what is looked at on the way, the choice of a solver."""
