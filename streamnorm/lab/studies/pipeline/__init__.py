"""The study ``pipeline``: what runs, what is claimed, what is drawn."""
