"""The study ``shakespeare``: what runs, what is claimed, what is drawn."""
