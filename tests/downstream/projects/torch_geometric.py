"""PyTorch Geometric: its batches of graphs, loaders and LightningDataset."""

from __future__ import annotations

import lightning as L
import torch
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.nn import GCNConv, global_mean_pool

PINS = ("torch-geometric==2.8.1",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}


class Net(L.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.convolution = GCNConv(3, width)
        self.out = torch.nn.Linear(width, 1)

    def forward(self, batch):
        hidden = self.convolution(batch.x, batch.edge_index).relu()
        hidden = torch.nn.functional.dropout(hidden, 0.2, self.training)
        return self.out(global_mean_pool(hidden, batch.batch)).squeeze(-1)

    def loss(self, batch, name):
        loss = torch.nn.functional.mse_loss(self(batch), batch.y)
        self.log(name, loss, batch_size=batch.num_graphs)
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch, "train_loss")

    def validation_step(self, batch, batch_idx):
        self.loss(batch, "val_loss")

    def test_step(self, batch, batch_idx):
        self.loss(batch, "test_loss")

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def graphs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(6, 3, generator=generator)
        edges = torch.randint(6, (2, 12), generator=generator)
        yield Data(x=x, edge_index=edges, y=x.sum().view(1))


def train(trainer, folder):
    sets = [list(graphs(count, seed)) for seed, count in enumerate((28, 8, 8, 8))]
    data = LightningDataset(*sets, batch_size=4, num_workers=0)
    module, trainer = Net(), L.Trainer(**trainer)
    trainer.fit(module, data)
    return {
        "test": lambda best: trainer.test(module, data, ckpt_path="best"),
        "predict": lambda best: trainer.predict(module, data, ckpt_path="best"),
        "load": Net.load_from_checkpoint,
    }
