"""Operators: what a layer computes on tensors, forward and backward, and the backends that compute it. No modules."""
