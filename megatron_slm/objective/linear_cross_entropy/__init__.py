"""Selective linear cross-entropy: hidden states and LM-head weight in, token losses and selected-only gradients out."""
