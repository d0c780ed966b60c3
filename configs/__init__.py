"""The configuration files, for ``importlib.resources`` to find them in an installed copy."""
