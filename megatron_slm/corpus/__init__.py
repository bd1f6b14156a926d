"""Corpora on disk: ``.bin/.idx`` files, metadata, fingerprints and validation."""
