"""A sweep over hyperparameters, some at a time, that may be killed at any time: run the same command again.

    python examples/configs/sweep.py

Each configuration has a folder that is named by its hyperparameters. `train` is what a scheduler such as Ray
Tune is given, too: it needs no more than its configuration, wherever it runs, as long as `runs/` is shared.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import lightning as L
from task import Numbers, Signs

from lightning_sbckpt import SBCheckpoint


def train(config: dict[str, float]) -> float:
    """Train one configuration, or go on with it, and return its best validation loss."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[SBCheckpoint("runs/sweep/{lr}-{width}", min_key="val_loss")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Signs(lr=config["lr"], width=int(config["width"])), Numbers()
    trainer.fit(model, datamodule=data)
    return trainer.validate(model, datamodule=data, verbose=False)[0]["val_loss"]


def main() -> None:
    """Train every configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-a-time", type=int, default=2)
    args = parser.parse_args()
    configs = [{"lr": lr, "width": width} for lr in (0.003, 0.03) for width in (8, 32)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.at_a_time, mp_context=spawn) as pool:
        for config, loss in zip(configs, pool.map(train, configs), strict=True):
            print(f"{config}: {loss:.12f}")


if __name__ == "__main__":
    main()
