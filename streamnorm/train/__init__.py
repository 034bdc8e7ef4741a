"""Training: weight updates that layers hear of, whole cycles in one call, and one update a sample."""
