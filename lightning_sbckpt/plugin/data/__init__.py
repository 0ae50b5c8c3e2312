"""Where the loaders of a run are, and how they get back there."""
