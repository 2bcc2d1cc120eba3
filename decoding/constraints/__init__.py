"""Constraints: which texts an answer may be, asked one token at a time."""
