"""Finding checkpoints among thousands: the index, the watch, the catalog of both."""
