"""Model folders: weights, what a base must be, model cards, digests."""
