"""Training and prediction loops shared by every paper."""
