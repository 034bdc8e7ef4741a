"""Training: notifying layers of weight updates, whole cycles in one call, and one update per sample."""
