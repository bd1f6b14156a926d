"""From files of text to .bin/.idx corpora: reading, encoding, writing, restarting, merging."""
