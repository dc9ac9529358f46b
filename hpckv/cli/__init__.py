"""The commands; one file a verb. No torch at import: they run on a login node."""
