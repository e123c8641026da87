"""The page of a run: what its folder holds, judged and drawn."""
