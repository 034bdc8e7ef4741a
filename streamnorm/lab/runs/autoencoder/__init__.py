"""Runs of auto-encoders: their settings, their documents, their network and their loop."""
