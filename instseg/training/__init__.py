"""Training loops shared by every paper."""
