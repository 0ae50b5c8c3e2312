"""A checkpoint folder and the files of ours in it; staging, publishing, listing, locking."""
