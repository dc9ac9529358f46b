"""Slurm and the machine: submitting a run (`submit`), what became of it (`status`, `wait`), what the machine has (`doctor`)."""
