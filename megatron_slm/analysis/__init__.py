"""Plots of what a run did."""
