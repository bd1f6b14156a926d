"""Flags of Megatron-LM's that are no settings here: those that hold anyway, and a remedy for every other one."""
