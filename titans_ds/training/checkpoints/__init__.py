"""A run on disk: saving, finding, checking and resuming."""
