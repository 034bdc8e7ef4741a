"""Recurrent layers: cells, the pass over time in a loop or compiled, and the layers."""
