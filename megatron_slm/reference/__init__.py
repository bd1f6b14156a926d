"""Where reference losses come from."""
