"""Torch's own file format: written past the page cache, read straight into live tensors."""
