"""Baselines and corpora shared by the benchmarks."""
