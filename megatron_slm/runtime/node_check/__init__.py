"""Check of the nodes of a job before its ranks start."""
