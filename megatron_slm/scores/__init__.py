"""The score sidecar of a corpus: reference losses of every token, scored once and read by many runs."""
