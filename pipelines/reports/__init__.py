"""What people look at: pages, comparisons, curves."""
