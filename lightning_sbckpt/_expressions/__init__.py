"""The language of conditions on meta; `lightning_sbckpt.expressions` is where users find it."""
