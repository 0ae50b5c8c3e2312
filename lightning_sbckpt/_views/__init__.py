"""What a table of checkpoints says, and how it is drawn in a width."""
