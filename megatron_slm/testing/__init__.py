"""Multi-rank runner, tiny models and corpora for tests and benchmarks."""
