"""Adaptations of Megatron-Core: CPU redirection, repairs and version differences, each with its reason."""
