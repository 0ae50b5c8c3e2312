"""Cross-validation that may be killed at any time: run the same command again.

    python examples/configs/kfold.py

Each fold has a folder of its own, by the number of the fold. What is done is not trained again, and the fold
that was killed goes on.
"""

from __future__ import annotations

import argparse

import lightning as L
from task import Numbers, Signs

from lightning_sbckpt import SBCheckpoint


def main() -> None:
    """Train each fold, or go on with it, and average what the best weights of each reach."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    losses = []
    for fold in range(args.folds):
        # Seeded for each fold, so that none depends on whether those before it were trained this time.
        L.seed_everything(fold, verbose=False)
        trainer = L.Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            callbacks=[SBCheckpoint("runs/kfold/{fold}", min_key="val_loss")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model, data = Signs(), Numbers(fold=fold, folds=args.folds)
        trainer.fit(model, datamodule=data)
        # The best weights are in the model, in a fold that was done before, too.
        losses.append(trainer.validate(model, datamodule=data, verbose=False)[0]["val_loss"])
        print(f"fold {fold}: {losses[-1]:.12f}")
    print(f"mean: {sum(losses) / len(losses):.12f}")


if __name__ == "__main__":
    main()
