"""The study ``autoencoder``: what runs, what is claimed, what is drawn."""
