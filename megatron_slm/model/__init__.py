"""GPT models built on Megatron-Core."""
