"""The shipped models, for ``importlib.resources`` to find them in an installed copy."""
