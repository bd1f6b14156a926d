"""Console commands, one module each: the trainer and the tools."""
