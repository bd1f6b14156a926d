"""Adaptations of Megatron-Core: CPU redirection, workarounds and version differences, each with its reason."""
