"""Models applied: evaluation on the pairs of a dataset, upscaling of pictures from anywhere; here or on a cluster.

Upscaling alone runs without the extra `pipeline`: nothing of it may import what only evaluation needs.
"""
