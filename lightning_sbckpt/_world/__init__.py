"""The ranks of a run: who decides, and how the others learn it."""
