"""The study ``references``: what runs, what is claimed, what is drawn."""
