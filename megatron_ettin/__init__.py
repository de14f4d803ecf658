"""Megatron-Ettin: train encoders and their decoder twins on one recipe, through Megatron-Core.

Holds the version only, so that importing the package costs nothing.
"""

__version__ = "0.1.0"
