"""The rules of retention, one kind per file; `lightning_sbckpt.retention` is where users find them."""
