"""LightningCLI with everything in a file: run it, kill it, and run the same command again.

    python examples/configs/with_cli.py fit --config examples/configs/cli.yaml

Any option may be given beside it: `--trainer.max_epochs 5`. CLI writes what it was started with to
`config.yaml`, and would refuse to start again where that is already, but for `overwrite`.
"""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI
from task import Numbers, Signs

if __name__ == "__main__":
    LightningCLI(Signs, Numbers, save_config_kwargs={"overwrite": True})
