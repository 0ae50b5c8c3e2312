"""What triggers are made of; `lightning_sbckpt.triggers` is where users find them."""
