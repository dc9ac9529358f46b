"""Test kits for those who extend hpckv: the tier conformance suite, tiny checkpoints. Nothing here is imported by it."""
