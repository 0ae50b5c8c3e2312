"""A small run that logs, in processes that die, and what its loggers hold afterwards."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import torch
from _processes import context
from lightning.pytorch import loggers
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from lightning_sbckpt import SBCheckpoint

KINDS = ("csv", "tensorboard", "mlflow", "wandb")


def logger_of(kind: str, folder: Path, **options: object) -> loggers.Logger:
    """Return a logger as a script makes it, the same at each start."""
    if kind == "csv":
        return loggers.CSVLogger(folder / "logs", **options)
    if kind == "tensorboard":
        return loggers.TensorBoardLogger(folder / "logs", **options)
    if kind == "mlflow":
        return loggers.MLFlowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db", **options)
    return loggers.WandbLogger(save_dir=folder / "logs", offline=True, project="digits", **options)


class Module(pl.LightningModule):
    """Logs on steps, on epochs, on both, not always, and a learning rate beside them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch).pow(2).mean() + torch.rand(())
        self.log("loss", loss, on_step=True, on_epoch=True)
        if index % 3 == 0:
            self.log("third", float(index))
        return loss

    def validation_step(self, batch, _):
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Kill(pl.Callback):
    """Kills its process in a hook, or some time after it."""

    def __init__(self, at: int, after: float) -> None:
        self.left, self.after = at, after

    def _count(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            if not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(self.after, os.kill, (os.getpid(), signal.SIGKILL)).start()

    on_train_batch_start = on_train_batch_end = on_train_epoch_end = _count
    on_train_epoch_start = on_validation_end = on_before_optimizer_step = _count


def fit(
    folder: Path,
    kinds,
    callbacks=(),
    *,
    epochs=3,
    module=Module,
    ckpt_path=None,
    devices=1,
    strategy="auto",
    monitor=True,
    where=None,
    **options,
):
    """Run the script once, and return its Trainer."""
    pl.seed_everything(1, verbose=False)
    data = torch.randn(40, 8)
    made = [logger_of(kind, folder) if isinstance(kind, str) else kind for kind in kinds]
    saves = SBCheckpoint(where or folder / "run", every_n_train_steps=4, **options)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=made or False,
        callbacks=[*callbacks, *([LearningRateMonitor()] if monitor else []), saves],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    trainer.fit(
        module(),
        torch.utils.data.DataLoader(data, batch_size=4, shuffle=True),
        torch.utils.data.DataLoader(data, batch_size=4),
        ckpt_path=ckpt_path,
    )
    return trainer


def stock(folder: Path, kinds, callbacks):
    """Run the same script with Lightning alone, resumed as its documentation says."""
    pl.seed_everything(1, verbose=False)
    data = torch.randn(40, 8)
    saves = ModelCheckpoint(folder / "files", every_n_train_steps=4, save_last=True)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=[logger_of(kind, folder) for kind in kinds],
        callbacks=[*callbacks, LearningRateMonitor(), saves],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    loaders = [torch.utils.data.DataLoader(data, batch_size=4, shuffle=s) for s in (True, False)]
    last = folder / "files" / "last.ckpt"
    trainer.fit(Module(), *loaders, ckpt_path=last if last.exists() else None)


def life(folder: Path, kinds, at: int, after: float, script=fit) -> None:
    """Run the script, perhaps to its end; its own words go into a file."""
    with (folder / "words.txt").open("a") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
        with suppress(SystemExit):
            script(folder, kinds, [Kill(at, after)])
        if wandb := sys.modules.get("wandb"):
            wandb.finish()  # As when an interpreter ends, which this one doesn't.


def lives(folder: Path, kinds, kills, script=fit) -> int:
    """Start the script again and again, killed as told, then to its end; return how often it died."""
    folder.mkdir(parents=True)
    died = 0
    for at, after in [*kills, (-1, 0.0)]:
        process = context.Process(target=life, args=(folder, kinds, at, after, script))
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "words.txt").read_text()[-4000:]
        died += process.exitcode != 0
    return died


def schedule(seed: int) -> list[tuple[int, float]]:
    """Return a random schedule of kills: in which hook of a start, and how long after it."""
    chance = random.Random(seed)
    return [
        (chance.randrange(1, 60), chance.choice([0.0, chance.random() / 20]))
        for _ in range(chance.randrange(1, 5))
    ]


# ---------------------------------------------------------------------- what loggers hold


def rows(kind: str, folder: Path) -> tuple[int, Counter[tuple[object, ...]]]:
    """Return how many runs a logger has begun, and how often each metric stands there at a step."""
    found: Counter[tuple[object, ...]] = Counter()
    runs = held(kind, folder)
    for run in runs.values():
        if kind == "csv":
            header, *lines = run[0] or [[]]
            for line in lines:
                named = dict(zip(header, line, strict=True))
                found.update((name, int(named["step"])) for name, value in named.items() if value)
        elif kind == "wandb":
            found.update((name, row.get("trainer/global_step")) for row in run for name in row)
        else:
            found.update((name, step) for name, points in run[0].items() for step, _ in points)
    return len(runs), found


def held(kind: str, folder: Path) -> dict[str, object]:
    """Return all that a logger of a kind holds: each metric with its steps and values, and the rest."""
    return {"csv": _csv, "tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}[kind](
        folder
    )


def _text(path):
    return path.read_text() if path.exists() else ""


def _csv(folder):
    versions = {}
    for version in sorted((folder / "logs" / "lightning_logs").iterdir()):
        lines = []
        with suppress(FileNotFoundError), (version / "metrics.csv").open(newline="") as file:
            lines = [*csv.reader(file)]
        versions[version.name] = lines, _text(version / "hparams.yaml")
    return versions


def _tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    versions = {}
    for version in sorted((folder / "logs" / "lightning_logs").iterdir()):
        events = EventAccumulator(str(version), size_guidance={"scalars": 0})
        events.Reload()
        scalars = {
            tag: [(each.step, each.value) for each in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }
        versions[version.name] = scalars, _text(version / "hparams.yaml")
    return versions


def _mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = []
    for run in client.search_runs(experiments):
        histories = {
            key: sorted((e.step, e.value) for e in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        runs.append((histories, run.data.params, run.info.status))
    return dict(enumerate(runs))


def _wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    runs = {}
    for path in sorted((folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb")):
        rows = runs.setdefault(path.name, [])
        for data in _records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join([*i.nested_key]) or i.key: json.loads(i.value_json) for i in items}
                rows.append({key: row[key] for key in row if key not in ("_timestamp", "_runtime")})
    # The id of a run is another in each folder.
    return {
        number: sorted(rows, key=lambda row: row["_step"])
        for number, rows in enumerate(runs.values())
    }


def _records(data):
    """Give the records of a file of W&B's: a log of LevelDB's form after seven bytes."""
    place, parts = 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts = [*([] if kind in (1, 2) else parts), data[place + 7 : place + 7 + length]]
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
