"""Frozen networks of the learned metrics, with the state-dict names of the published files."""
