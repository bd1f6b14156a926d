"""Benchmarks: log-likelihoods and generated text of a model, scored as lm-evaluation-harness does."""
