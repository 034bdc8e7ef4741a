"""The commands, a file for each kind of model or task: dataclasses whose fields are the flags, and the functions that
carry them out. They ask the rooms below and show what those found; nothing is computed here.
"""
