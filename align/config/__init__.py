"""Recipes as typed, strict objects."""
