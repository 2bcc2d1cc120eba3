"""Which weights: packaged, local or from a hub; dtype, adapters, reference, hashes."""
