"""Score sidecars: per-token reference losses of a corpus, computed once and shared by many runs."""
