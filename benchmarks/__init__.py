"""Measurements of this project, and of others beside it; not part of the installed package."""
