"""The study ``accumulation``: what runs, what is claimed, what is drawn."""
