"""Losses: preference objectives as pure tensor functions. This floor knows torch and nothing else."""
