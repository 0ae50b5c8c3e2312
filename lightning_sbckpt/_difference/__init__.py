"""How two checkpoints are compared; `lightning_sbckpt.difference` is where users find it."""
