"""Datasets and micro-batches: blends, splits, sample orders and index caching."""
