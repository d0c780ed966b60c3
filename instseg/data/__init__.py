"""Data sets, images and their checks."""
