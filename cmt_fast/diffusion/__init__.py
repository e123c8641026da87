"""Paths, solvers, guidance, few-step sampling and randomness, as functions of a callable net."""
