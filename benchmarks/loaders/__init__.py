"""Loaders of several projects, put to the same cases: how each resumes, and what it costs."""
