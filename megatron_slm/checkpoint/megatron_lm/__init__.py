"""Checkpoints of Megatron-LM, Megatron-Bridge and NeMo."""
