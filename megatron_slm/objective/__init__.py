"""Selective Language Modeling: scores, exact threshold and vocab-parallel cross-entropy."""
