"""Checkpoints to other formats and back; one subject per module, huggingface.py is the door."""
