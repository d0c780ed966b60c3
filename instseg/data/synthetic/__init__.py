"""The built-in data sets, which are made when they are read."""
