"""Feedback in, token ids out; nothing dropped in silence."""
