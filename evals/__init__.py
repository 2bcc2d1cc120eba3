"""Evals: what a model, a reward or a decoder is worth. Every number comes with its n and its interval."""
