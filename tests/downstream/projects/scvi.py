"""scvi-tools: SCVI, which makes module, data and Trainer by itself."""

from __future__ import annotations

import anndata
import numpy as np
import scvi
import torch

PINS = ("scvi-tools==1.4.2",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "elbo_validation"}
PREVENTS = {"test": "`SCVI` has no test of its own, and its training plan no `test_step`"}
NOTES = (
    "it turns checkpointing off unless it is given `enable_checkpointing=True`, and then adds a `SaveCheckpoint` of its own",
    "`SCVI.load` reads folders that `SCVI.save` has written: the weights go in between",
)


def train(trainer, folder):
    scvi.settings.seed = 7
    counts = np.random.poisson(2.0, (60, 12)).astype("float32")  # noqa: NPY002
    data = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, n_hidden=8, n_latent=2)
    options = {**trainer, "logger": None, "enable_checkpointing": True}
    model.train(train_size=0.75, batch_size=8, check_val_every_n_epoch=1, **options)

    def load(best):
        model.module.load_state_dict(
            {
                name.removeprefix("module."): value
                for name, value in torch.load(best / "model.ckpt", weights_only=True).items()
                if name.startswith("module.")
            }
        )
        model.save(folder / "saved", overwrite=True)
        loaded = scvi.model.SCVI.load(folder / "saved", data)
        return {f"module.{name}": value for name, value in loaded.module.state_dict().items()}

    return {
        "predict": lambda best: torch.from_numpy(model.get_latent_representation()),
        "load": load,
    }
