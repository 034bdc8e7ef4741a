"""The study ``convolutional``: what runs, what is claimed, what is drawn."""
