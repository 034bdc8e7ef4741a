"""The study ``unrolled``: what runs, what is claimed, what is drawn."""
