"""The run folder: manifest, metrics and their mirror in W&B."""
