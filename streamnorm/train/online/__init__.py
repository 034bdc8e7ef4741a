"""One weight update a sample: the trainer, what it compiles a model to, and optimizers of its own."""
