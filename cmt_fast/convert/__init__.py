"""Checkpoints in and out: other projects' files become a finished stage of a run, a stage becomes a file or a pipeline.

Kept free of imports: the process that reads a pickle starts with this package and must stay small.
"""
