"""The study ``moments``: what runs, what is claimed, what is drawn."""
