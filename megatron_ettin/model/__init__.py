"""The Ettin architecture out of Megatron-Core's parts."""
