"""Chains of commands that can be stopped and repeated, and those that the demo and a study are made of."""
