"""Continued training of an existing model on one's own text: defaults, checks, files of the run."""
