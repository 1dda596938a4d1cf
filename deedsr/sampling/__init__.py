"""Sampling: the pipeline, noise guidance, tiles, colour correction."""
