"""Measurements of this project, and of others beside it; no part of the installed package."""
