"""The state of a run: what is captured, and how it is given back."""
