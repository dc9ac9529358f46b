"""Slurm and containers: submitting runs. Empty in this version; `hpckv run` works inside any allocation."""
