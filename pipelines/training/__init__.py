"""One trainer for both stages: Ray Train places the workers, a DeepSpeed engine holds what trains."""
