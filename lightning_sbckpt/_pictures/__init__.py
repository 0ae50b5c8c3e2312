"""What happened in a run, made visible: lives of checkpoints, drawings, cards, the page."""
