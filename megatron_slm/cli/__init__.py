"""Commands, one module each: the trainer and the tools."""
