"""Training: data sets, architectures and the loops of the experiments."""
