"""Prediction on images and videos, shared by every paper."""
