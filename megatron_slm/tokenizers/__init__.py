"""Tokenizers by Megatron-LM's names, and their equivalents for gigatoken."""
