"""Losses from logical formulas (arXiv:2412.17696)."""
