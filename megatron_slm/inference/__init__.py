"""Inference with trained models: log-likelihoods of tokens, and text generation."""
