"""The experiments: each file holds its runs (data), its claims (checked by code) and says what its record shows."""
