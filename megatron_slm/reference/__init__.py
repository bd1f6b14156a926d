"""Sources of reference losses: the reference model, and score sidecars."""
