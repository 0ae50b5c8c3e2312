"""The command as a module: `python -m lightning_sbckpt.cli`."""

from __future__ import annotations

from lightning_sbckpt.cli import main

main(prog_name="lightning-sbckpt")
