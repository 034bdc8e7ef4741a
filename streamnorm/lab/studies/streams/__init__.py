"""The study ``streams``: what runs, what is claimed, what is drawn."""
