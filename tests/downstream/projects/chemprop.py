"""Chemprop: message passing on molecules; hyperparameters that are classes and metrics."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from chemprop import data, featurizers, models, nn

from lightning_sbckpt.plugin.export import to_lightning

PINS = ("chemprop==2.3.1",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}
NOTES = (
    "`MPNN.load_from_checkpoint` opens the file itself, so it takes one made by `lightning-sbckpt export`",
)

SMILES = ["C" * n + end for n in range(1, 9) for end in ("", "O", "N", "=O", "Cl", "c1ccccc1")]


def train(trainer, folder):
    points = [data.MoleculeDatapoint.from_smi(each, [float(len(each))]) for each in SMILES]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    training, later = (data.MoleculeDataset(points[start::2], featurizer) for start in (0, 1))
    later.normalize_targets(training.normalize_targets())
    module = models.MPNN(
        nn.BondMessagePassing(d_h=8, depth=2, dropout=0.2),
        nn.MeanAggregation(),
        nn.RegressionFFN(input_dim=8, hidden_dim=8),
        batch_norm=True,
        metrics=[nn.metrics.RMSE(), nn.metrics.MAE()],
    )
    evaluated = data.build_dataloader(later, batch_size=4, num_workers=0, shuffle=False)
    trainer = L.Trainer(**trainer)
    trainer.fit(module, data.build_dataloader(training, batch_size=4, num_workers=0), evaluated)

    def load(best):
        file = to_lightning(best, folder / "exported.ckpt", overwrite=True).path
        return models.MPNN.load_from_checkpoint(file)

    return {
        "test": lambda best: trainer.test(module, evaluated, ckpt_path="best"),
        "predict": lambda best: torch.cat(trainer.predict(module, evaluated, ckpt_path="best")),
        "load": load,
    }
