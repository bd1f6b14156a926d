"""Stub for tools that run setup.py; the metadata are in pyproject.toml."""

from setuptools import setup

setup()
