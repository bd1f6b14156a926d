"""Slurm jobs: batch scripts, submission, chains of dependent jobs, their status, logs and cancellation."""
