"""The study ``inception``: what runs, what is claimed, what is drawn."""
