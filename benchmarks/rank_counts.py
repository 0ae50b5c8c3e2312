"""What a save of a real fit of several ranks does, counted: collectives, and operations of the disk."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.ranks import run_ranks
from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt.plugin.saving import Saving

COLLECTIVES = ("broadcast", "gather", "all_gather", "all_reduce", "barrier")
OPERATIONS = (
    "make_dir",
    "create",
    "flush_file",
    "flush_dir",
    "rename",
    "remove_file",
    "remove_dir",
)
_LISTINGS = ("os.listdir", "os.scandir")
_STEPS = 4


class Small(L.LightningModule):
    """A classifier that logs and has a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        x, y = batch
        logits = self.layer(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _count(counts: Counter[str], folder: Path) -> None:
    """Count every collective, every change of the disk and every listing of this process."""
    for name in COLLECTIVES:
        original: Callable[..., Any] = getattr(distributed_c10d, name)

        def counted(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _original(*args, **kwargs)

        # What takes objects calls those of its own module; others go through the package.
        setattr(distributed_c10d, name, counted)
        setattr(dist, name, counted)

    def before(_: LocalStorage, operation: str, *_paths: object) -> None:
        counts[operation] += 1

    LocalStorage.before = before  # type: ignore[method-assign, assignment]

    def listed(event: str, args: tuple[Any, ...]) -> None:
        if event not in _LISTINGS:
            return
        # A folder is listed by its name, or by a descriptor of it.
        path = (
            str(Path(f"/proc/self/fd/{args[0]}").readlink())
            if type(args[0]) is int
            else str(args[0])
        )
        if path.startswith(str(folder)):
            counts["listing" if path == str(folder) else "folder_listing"] += 1

    sys.addaudithook(listed)


def fit(rank: int, size: int, port: int, folder: Path, keep: int) -> None:
    """Fit as one rank, and write down what the last save within the epoch has done."""
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(size),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    saves: list[dict[str, int]] = []
    save = Saving._save  # noqa: SLF001 - what is counted is one save, to its end

    def counted_save(self: Saving, *args: Any, **kwargs: Any) -> dict[str, object]:
        counts.clear()
        meta = save(self, *args, **kwargs)
        saves.append(dict(counts))
        return meta

    Saving._save = counted_save  # type: ignore[method-assign]  # noqa: SLF001
    run = folder / f"{size}-{keep}"
    _count(counts, run)
    L.seed_everything(rank, verbose=False)
    data = TensorDataset(torch.randn(8 * size * _STEPS, 8), torch.randint(3, (8 * size * _STEPS,)))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=size,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SBCheckpoint(run, every_n_train_steps=1, every_n_epochs=None, num_to_keep=keep)],
    )
    trainer.fit(Small(), DataLoader(data, 8))
    checkpoint = trainer.checkpoint_callback.last_model_path if rank == 0 else ""  # type: ignore[union-attr]
    files = sorted(os.listdir(checkpoint)) if checkpoint else []
    told = {"counts": saves[-2], "files": files}
    (folder / f"counts{rank}.json").write_text(json.dumps(told))


def counts_of(size: int, folder: Path, keep: int) -> list[dict[str, Any]]:
    """Return what each rank counted in one save, and the files of a checkpoint.

    Args:
        size: How many ranks.
        folder: Where to save.
        keep: How many checkpoints stay: with many a save removes nothing.

    Raises:
        RuntimeError: A rank failed.
    """
    run_ranks(size, lambda port: (port, folder, keep), fit, 120)
    return [json.loads((folder / f"counts{rank}.json").read_text()) for rank in range(size)]
