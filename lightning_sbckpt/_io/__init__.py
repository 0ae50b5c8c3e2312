"""The disk itself: what writes, reads and flushes bytes. Nothing here knows what a checkpoint is."""
