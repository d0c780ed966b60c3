"""Configuration: files, keys, rules of their values, and the classes of a model."""
