"""Checkpoints on a remote store: its URL, and what may be done there."""
