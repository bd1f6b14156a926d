"""Process start-up, groups, console and signals."""
