"""Preprocessing of text files to ``.bin/.idx`` corpora: reading, encoding, writing, resuming and merging."""
