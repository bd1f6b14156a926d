"""Checkpoint content: model weights and optimizer state in Megatron-Core's distributed format."""
