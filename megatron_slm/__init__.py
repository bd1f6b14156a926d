"""Selective Language Modeling on Megatron-Core: pretrain on the tokens that are worth learning."""

__version__ = "0.1.0"
