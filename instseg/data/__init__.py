"""Data sets, pictures and their checks."""
