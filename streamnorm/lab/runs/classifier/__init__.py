"""Runs of classifiers: their settings, their data, their networks and their loop."""
