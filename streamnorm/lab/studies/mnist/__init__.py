"""The study ``mnist``: what runs, what is claimed, what is drawn."""
