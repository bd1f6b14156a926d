"""Process start-up, process groups, errors, files, console and signals."""
