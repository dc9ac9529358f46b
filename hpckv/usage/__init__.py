"""Accounting. Empty in this version; a run's counters are in its `summary.json`, each answer's in its `usage`."""
