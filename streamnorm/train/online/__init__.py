"""One weight update per sample: the trainer, and the parameters of its compiled step for a model and an optimizer."""
