"""The exact lab: finite worlds whose aligned optimum is known."""
