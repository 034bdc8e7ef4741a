"""Runs of language models: their settings, their text, their network and their loop."""
