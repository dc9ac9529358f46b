"""Test kits for those who extend hpckv: conformance suites of tiers and groups, tiny checkpoints. It imports nothing from here."""
