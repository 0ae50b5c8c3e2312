"""Hydra with everything in a file: run it, kill it, and run the same command again.

    python examples/configs/with_hydra.py

Any value may be given beside it: `trainer.max_epochs=5`, or `-m module.lr=0.1,0.01` for a sweep, in which
each job has the folder of its hyperparameters. Hydra makes a new folder at every start, `outputs/DATE/TIME`;
the checkpoints are not in there, since the next start would not find them.
"""

from __future__ import annotations

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path=".", config_name="hydra")
def main(config: DictConfig) -> None:
    """Train, or go on training."""
    L.seed_everything(config.seed, verbose=False)
    trainer = instantiate(config.trainer)
    trainer.fit(instantiate(config.module), datamodule=instantiate(config.data))


if __name__ == "__main__":
    main()
