"""Plots and summaries of training runs."""
