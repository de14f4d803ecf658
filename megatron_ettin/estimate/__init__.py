"""Estimate of memory, time, steps and disk of a run before it starts; imports no torch."""
