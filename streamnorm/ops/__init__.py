"""Operators: a layer's forward and backward pass on tensors, and the backends that compute them. No modules."""
