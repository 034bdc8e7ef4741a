"""The study ``specialcase``: what runs, what is claimed, what is drawn."""
