"""The study ``online``: what runs, what is claimed, what is drawn."""
