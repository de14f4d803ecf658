"""One optimizer step and what is around it."""
