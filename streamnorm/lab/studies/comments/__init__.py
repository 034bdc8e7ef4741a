"""The study ``comments``: what runs, what is claimed, what is drawn."""
