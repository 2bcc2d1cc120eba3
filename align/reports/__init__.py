"""The run as one self-contained page, and its model card."""
