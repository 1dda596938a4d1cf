"""Datasets of shards as they are read: index, order, loader, cache."""
