"""Looks into a tokenised corpus: `verify`, `describe` and `show` of tools/dataset.py."""
