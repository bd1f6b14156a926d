"""Corpora on disk: .bin and .idx files, their metadata and checks."""
