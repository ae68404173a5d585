"""Experiments: runs that belong together, each trained and scored once, into one JSON per run."""
