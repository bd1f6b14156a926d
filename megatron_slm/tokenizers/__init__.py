"""Text to token ids and back, and where a text may be cut without changing them."""
