"""GPT models on Megatron-Core."""
