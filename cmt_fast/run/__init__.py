"""A run: its folder, its stages with every name resolved, their networks."""
