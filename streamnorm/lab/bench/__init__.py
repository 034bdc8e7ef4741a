"""Benchmarks: what a layer costs beside its peers, timed only after it has been shown to be right."""
