"""Positive controls: small tasks that a memory must solve, through the same graft, session and training step."""
