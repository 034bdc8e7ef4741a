"""The study ``smallbatch``: what runs, what is claimed, what is drawn."""
