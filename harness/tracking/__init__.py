"""Curves, W&B and progress."""
