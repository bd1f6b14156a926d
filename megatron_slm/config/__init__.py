"""Typed configuration with Megatron-LM's flat flag names."""
