"""The runs whose exact resume is tested: small ones, each with one thing that is hard to resume.

A cell is a set of changes to one base run: an MLP with dropout and batch normalization, trained by
AdamW on shuffled random data, with metrics of every kind logged.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_sbckpt import SBCheckpoint

SAMPLES, FEATURES, CLASSES, BATCH = 40, 6, 3, 4
BATCHES = SAMPLES // BATCH


class Numbers(Dataset):
    """Random but fixed samples; `noise` adds augmentation from each global random stream."""

    def __init__(self, noise: bool = False, length: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(length, FEATURES, generator=generator)
        self.y = torch.randint(CLASSES, (length,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        x = self.x[index]
        if self.noise:
            x = x + 0.1 * torch.randn(FEATURES) + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002 - the global stream is meant
        return x.float(), self.y[index]


class Stream(IterableDataset):
    """An iterable of the same samples, through a shuffle buffer; with a length or without."""

    def __init__(self, sized: bool) -> None:
        self.numbers = Numbers()
        if sized:
            self.__class__ = type("SizedStream", (Stream,), {"__len__": lambda self: SAMPLES})

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        buffer = []
        for index in range(start, SAMPLES, step):
            buffer.append(self.numbers[index])
            if len(buffer) > 5:
                yield buffer.pop(random.randrange(len(buffer)))
        yield from buffer


class Shuffled(Sampler):
    """A sampler of somebody's own, with a generator and, if asked for, a state."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.generator = np.random.default_rng(5)

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return iter(self.generator.permutation(self.length).tolist())


class StatefulShuffled(Shuffled):
    """Goes on where it was, as its state says."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.epoch, self.done = 0, 0

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(self.length).tolist()
        for index in order[self.done :]:
            self.done += 1
            yield index
        self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


class Model(L.LightningModule):
    """A small classifier that logs in every way there is."""

    def __init__(self, scheduler: str = "step", compute_auroc: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8, CLASSES)
        self.train_acc = MulticlassAccuracy(CLASSES)
        self.train_mean = MeanMetric()
        self.val_metrics = MetricCollection(
            {"acc": MulticlassAccuracy(CLASSES), "auroc": MulticlassAUROC(CLASSES)}, prefix="val_"
        )

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.train_mean.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_max", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        if batch_idx % 3 == 0:
            self.log("every_third", loss * 2, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("train_mean", self.train_mean.compute())
        self.train_mean.reset()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.val_metrics.update(logits.softmax(-1), y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        kind = self.hparams.scheduler
        if kind == "none":
            return optimizer
        if kind == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=0, factor=0.5
            )
            config = {"scheduler": scheduler, "monitor": "val_loss"}
        elif kind == "plateau-step":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=2, factor=0.9
            )
            config = {"scheduler": scheduler, "monitor": "train_loss_step", "interval": "step"}
        elif kind == "epoch":
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
            config = {"scheduler": scheduler, "interval": "epoch"}
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
            config = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class GAN(L.LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, FEATURES))
        self.discriminator = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        real, _ = batch
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        loss_d = (self.discriminator(real) - 1).pow(2).mean()
        loss_d = loss_d + self.discriminator(fake.detach()).pow(2).mean()
        second.zero_grad()
        self.manual_backward(loss_d)
        second.step()
        # The generator steps on every other batch, with the gradients of both.
        loss_g = (self.discriminator(fake) - 1).pow(2).mean()
        self.manual_backward(loss_g)
        if batch_idx % 2:
            first.step()
            first.zero_grad()
            self.lr_schedulers().step()
        self.log_dict({"loss_d": loss_d, "loss_g": loss_g}, on_step=True, on_epoch=True)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.discriminator(self.generator(torch.randn(4, 4))).mean())

    def configure_optimizers(self):
        first = torch.optim.Adam(self.generator.parameters(), lr=0.01)
        second = torch.optim.SGD(self.discriminator.parameters(), lr=0.01, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(first, 0.9)]


class Unfreeze(BaseFinetuning):
    """Trains the head alone for one epoch, then everything."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.001)


class FinetuneModel(Model):
    """Gives the optimizer only what is not frozen."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class TunedModel(Model):
    """Has a learning rate to be found."""

    def __init__(self) -> None:
        super().__init__("epoch")
        self.lr = 0.01

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


class TunedData(L.LightningDataModule):
    """Has a batch size to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return DataLoader(Numbers(noise=True), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return val_loader()


class Reloading(L.LightningDataModule):
    """Makes its loaders anew when asked to, another one for each epoch."""

    def train_dataloader(self):
        length = SAMPLES if self.trainer.current_epoch % 2 == 0 else SAMPLES - 2 * BATCH
        return DataLoader(Numbers(length=length), BATCH, shuffle=True)

    def val_dataloader(self):
        return val_loader()


def val_loader(**options) -> DataLoader:
    """Return a loader of two batches."""
    return DataLoader(Numbers(length=2 * BATCH), BATCH, **options)


def train_loader(noise: bool = False, dataset=None, **options) -> DataLoader:
    """Return the shuffled loader of a cell."""
    dataset = dataset or Numbers(noise)
    if not isinstance(dataset, IterableDataset) and "sampler" not in options:
        options.setdefault("shuffle", True)
    return DataLoader(dataset, BATCH, **options)


def seeded_loader(seed: int = 3, **options) -> DataLoader:
    """Return a loader with a generator of its own."""
    return train_loader(generator=torch.Generator().manual_seed(seed), **options)


def stateful_loader(**options):
    """Return torchdata's loader, which carries its state."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Numbers(noise=True), BATCH, shuffle=True, **options)


def sampled(sampler: type, **options) -> DataLoader:
    """Return a loader with a sampler of somebody's own."""
    return train_loader(sampler=sampler(SAMPLES), **options)


def several_loaders():
    """Return two loaders of different length; the shorter one starts again within the epoch."""
    long, short = train_loader(), DataLoader(Numbers(length=3 * BATCH), BATCH, shuffle=True)
    return {"a": long, "b": short}


def several_streams():
    """Return two iterables, the shorter one without a length and with a generator of its own."""
    short = DataLoader(Numbers(length=3 * BATCH), BATCH, shuffle=True, generator=torch.Generator())
    return {"a": train_loader(dataset=Stream(False)), "b": short}


class TwoLoaders(Model):
    """Takes a batch from each of two loaders."""

    def training_step(self, batch, batch_idx):
        (x, y), (other, _) = batch["a"], batch["b"]
        return super().training_step((x + 0.1 * other, y), batch_idx)


def make(
    dirpath: Path,
    *,
    model: Callable[[], L.LightningModule] = Model,
    loader: Callable[[], object] = train_loader,
    val: Callable[[], object] | None = val_loader,
    data: Callable[[], object] | None = None,
    callbacks: Callable[[], list] = list,
    trainer: dict | None = None,
    checkpoint: dict | None = None,
):
    """Return Trainer, module and data of a cell."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    L.seed_everything(11, verbose=False)
    module = model()
    options = {"min_key": "val_loss", **(checkpoint or {})}
    made = L.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            **(trainer or {}),
        },
        callbacks=[*callbacks(), SBCheckpoint(dirpath, **options)],
    )
    if data is not None:
        return made, module, data()
    loaders = {"train_dataloaders": loader()}
    if val is not None:
        loaders["val_dataloaders"] = val()
    return made, module, loaders


def ema() -> list:
    """Return Lightning's own averaging of weights."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return [EMAWeightAveraging(decay=0.9)]


def swa() -> list:
    """Return an averaging over the epochs from the second on, that makes a scheduler of its own."""
    return [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2)]


class Unnormalized(Model):
    """Has no statistics that an averaging would take one more epoch for."""

    def __init__(self) -> None:
        super().__init__("epoch")
        self.body[1] = nn.Identity()


def accumulating() -> list:
    """Return a change of the accumulation between two epochs."""
    return [GradientAccumulationScheduler({0: 1, 1: 3})]


def lr_finder() -> list:
    """Return a search that goes over several epochs."""
    return [LearningRateFinder(num_training_steps=24, early_stop_threshold=None)]


def batch_size_finder() -> list:
    """Return a search that finds the usual batch size."""
    return [BatchSizeFinder(init_val=2, max_trials=2)]


def early_stopping() -> list:
    """Return a stopper that stops soon."""
    return [EarlyStopping("val_loss", patience=0, min_delta=0.05)]


def patient() -> list:
    """Return a stopper that leaves the second epoch its chance, however often is validated."""
    return [EarlyStopping("val_loss", patience=9)]


class WideModel(Model):
    """Has a tensor so large that its copy is hidden behind training where that is asked for."""

    def __init__(self, scheduler: str = "step", compute_auroc: bool = True) -> None:
        super().__init__(scheduler, compute_auroc)
        self.body[0] = nn.Sequential(nn.Linear(FEATURES, 12_000), nn.Linear(12_000, 8))


BY_STEP = {"every_n_train_steps": 3}
ASYNC = {**BY_STEP, "save_mode": "async"}
OVERLAP = {**BY_STEP, "save_mode": "overlap"}
POINTS = (
    "on_train_batch_start:5",
    ("on_train_batch_start:14", "on_train_batch_start:5"),
    "on_train_epoch_end:2",
    "on_validation_batch_start:5",
)

CELLS: dict[str, Callable] = {
    "base": make,
    "saved at every step": partial(make, checkpoint={"every_n_train_steps": 1}),
    "no validation": partial(make, val=None, checkpoint={"min_key": "train_loss"}),
    "augmentation": partial(make, loader=partial(train_loader, noise=True), checkpoint=BY_STEP),
    "workers": partial(
        make, loader=partial(train_loader, noise=True, num_workers=2), checkpoint=BY_STEP
    ),
    "persistent workers": partial(
        make,
        loader=partial(train_loader, noise=True, num_workers=2, persistent_workers=True),
        checkpoint=BY_STEP,
    ),
    "seeded generator": partial(make, loader=seeded_loader, checkpoint=BY_STEP),
    "own sampler": partial(make, loader=partial(sampled, Shuffled), checkpoint=BY_STEP),
    "own sampler with a state": partial(
        make, loader=partial(sampled, StatefulShuffled), checkpoint=BY_STEP
    ),
    "sized iterable": partial(
        make, loader=lambda: train_loader(dataset=Stream(True)), checkpoint=BY_STEP
    ),
    "unsized iterable": partial(
        make, loader=lambda: train_loader(dataset=Stream(False)), checkpoint=BY_STEP
    ),
    "stateful loader": partial(make, loader=stateful_loader, checkpoint=BY_STEP),
    "stateful loader, workers": partial(
        make, loader=partial(stateful_loader, num_workers=2), checkpoint=BY_STEP
    ),
    "several loaders": partial(make, model=TwoLoaders, loader=several_loaders, checkpoint=BY_STEP),
    "several loaders, one unsized": partial(
        make, model=TwoLoaders, loader=several_streams, checkpoint=BY_STEP
    ),
    "limit_train_batches as int": partial(
        make, trainer={"limit_train_batches": 7}, checkpoint=BY_STEP
    ),
    "limit_train_batches as fraction": partial(
        make, trainer={"limit_train_batches": 0.6}, checkpoint=BY_STEP
    ),
    "overfit_batches": partial(make, trainer={"overfit_batches": 4}, checkpoint=BY_STEP),
    "val_check_interval 0.25": partial(make, trainer={"val_check_interval": 0.25}),
    "val_check_interval in steps": partial(
        make, trainer={"val_check_interval": 4, "check_val_every_n_epoch": None}
    ),
    "check_val_every_n_epoch 2": partial(
        make, trainer={"check_val_every_n_epoch": 2, "max_epochs": 4}
    ),
    "reload_dataloaders_every_n_epochs": partial(
        make,
        data=Reloading,
        trainer={"reload_dataloaders_every_n_epochs": 2, "max_epochs": 4},
        checkpoint=BY_STEP,
    ),
    "two optimizers by hand": partial(make, model=GAN, checkpoint=BY_STEP),
    "epoch scheduler": partial(make, model=partial(Model, "epoch"), checkpoint=BY_STEP),
    "plateau scheduler": partial(make, model=partial(Model, "plateau"), checkpoint=BY_STEP),
    "plateau scheduler by step": partial(
        make, model=partial(Model, "plateau-step"), checkpoint=BY_STEP
    ),
    "gradient clipping": partial(make, trainer={"gradient_clip_val": 0.1}, checkpoint=BY_STEP),
    "gradient accumulation": partial(
        make,
        trainer={"accumulate_grad_batches": 3, "val_check_interval": 0.25},
        checkpoint={"train_time_interval": timedelta(microseconds=1)},
    ),
    "bf16-mixed": partial(make, trainer={"precision": "bf16-mixed"}, checkpoint=BY_STEP),
    "early stopping": partial(
        make, callbacks=early_stopping, trainer={"max_epochs": -1}, checkpoint=BY_STEP
    ),
    "weight averaging": partial(make, callbacks=ema, checkpoint=BY_STEP),
    "finetuning": partial(
        make, model=FinetuneModel, callbacks=lambda: [Unfreeze()], checkpoint=BY_STEP
    ),
    "stochastic weight averaging": partial(
        make, callbacks=swa, trainer={"max_epochs": 4}, checkpoint=BY_STEP
    ),
    "stochastic weight averaging, no normalization": partial(
        make, model=Unnormalized, callbacks=swa, trainer={"max_epochs": 4}, checkpoint=BY_STEP
    ),
    "accumulation that changes": partial(make, callbacks=accumulating, checkpoint=BY_STEP),
    "learning rate finder": partial(
        make, model=TunedModel, callbacks=lr_finder, data=TunedData, checkpoint=BY_STEP
    ),
    "batch size finder": partial(
        make, callbacks=batch_size_finder, data=TunedData, checkpoint=BY_STEP
    ),
    "max_steps": partial(make, trainer={"max_steps": 25, "max_epochs": -1}, checkpoint=BY_STEP),
    "max_time": partial(
        make, trainer={"max_time": {"hours": 1}, "max_epochs": 2}, checkpoint=BY_STEP
    ),
    "save_mode async": partial(make, model=WideModel, checkpoint=ASYNC),
    "save_mode overlap": partial(make, model=WideModel, checkpoint=OVERLAP),
    "save_mode overlap, accumulation": partial(
        make,
        model=WideModel,
        trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        checkpoint={"train_time_interval": timedelta(microseconds=1), "save_mode": "overlap"},
    ),
    "save_mode overlap, weight averaging": partial(
        make, model=WideModel, callbacks=ema, checkpoint=OVERLAP
    ),
    "save_mode overlap, two optimizers by hand": partial(make, model=GAN, checkpoint=OVERLAP),
}

# The cells above change one thing each. These are drawn, with a fixed seed, from all their products.
DRAWN_LOADERS = {
    "augmentation": partial(train_loader, noise=True),
    "workers": partial(train_loader, noise=True, num_workers=2),
    "persistent workers": partial(train_loader, noise=True, num_workers=2, persistent_workers=True),
    "seeded generator": seeded_loader,
    "own sampler": partial(sampled, Shuffled),
    "sized iterable": lambda: train_loader(dataset=Stream(True)),
    "stateful loader": stateful_loader,
}
DRAWN_SCHEDULERS = {
    "step scheduler": "step",
    "epoch scheduler": "epoch",
    "plateau scheduler": "plateau",
    "plateau scheduler by step": "plateau-step",
}
DRAWN_TRAINERS = {
    "accumulation": {"accumulate_grad_batches": 3},
    "val_check_interval 0.25": {"val_check_interval": 0.25},
    "accumulation, val_check_interval 0.25": {
        "accumulate_grad_batches": 3,
        "val_check_interval": 0.25,
    },
    "bf16, clipping": {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
    "check_val_every_n_epoch 2": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "limited batches": {"limit_train_batches": 7},
}
DRAWN_CALLBACKS = {"no callback": list, "weight averaging": ema, "patience": patient}
DRAWN_CHECKPOINTS = {
    "by step": BY_STEP,
    "at validation": {},
    "by the clock": {"train_time_interval": timedelta(microseconds=1)},
}


def drawn(
    count: int, seed: int, base: type[Model] = Model, **checkpoint_options: str
) -> dict[str, Callable]:
    """Return so many cells that change one thing of each kind."""
    draw = random.Random(seed)
    cells = {}
    while len(cells) < count:
        choices = [
            draw.choice(sorted(kind))
            for kind in (
                DRAWN_LOADERS,
                DRAWN_SCHEDULERS,
                DRAWN_TRAINERS,
                DRAWN_CALLBACKS,
                DRAWN_CHECKPOINTS,
            )
        ]
        loader, scheduler, trainer, callbacks, checkpoint = choices
        if "check_val" in trainer and (scheduler == "plateau scheduler" or "patience" in callbacks):
            continue  # Both want a validation in every epoch.
        name = "drawn: " + ", ".join([*choices, *checkpoint_options.values()])
        cells[name] = partial(
            make,
            loader=DRAWN_LOADERS[loader],
            model=partial(base, DRAWN_SCHEDULERS[scheduler]),
            trainer=DRAWN_TRAINERS[trainer],
            callbacks=DRAWN_CALLBACKS[callbacks],
            checkpoint={**DRAWN_CHECKPOINTS[checkpoint], **checkpoint_options},
        )
    return cells


CELLS.update(drawn(16, seed=5))
CELLS.update(drawn(5, seed=6, base=WideModel, save_mode="async"))
CELLS.update(drawn(5, seed=7, base=WideModel, save_mode="overlap"))


class Backwards(Model):
    """Registers its layers in another order than it uses them in, some of them twice or never."""

    def __init__(self, idle: bool = False, twice: bool = False) -> None:
        super().__init__()
        body = self.body
        del self.body
        self.wide = nn.Linear(FEATURES, FEATURES)
        self.body, self.twice = body, twice
        if idle:
            self.idle = nn.Linear(2, 2)

    def forward(self, x):
        inner = self.wide(x) + x
        return self.head(self.body(self.wide(inner) if self.twice else inner))


class InPieces(Backwards):
    """Divided among the ranks by FSDP2."""

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self, FSDPModule):
            for part in (self.body, self.wide, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def on_ranks(
    dirpath: Path,
    *,
    size: int = 3,
    strategy: Callable[..., object] = DDPStrategy,
    options: dict | None = None,
    model: Callable[[], L.LightningModule] = Backwards,
    trainer: dict | None = None,
    checkpoint: dict | None = None,
):
    """Return a run of several processes, with several buckets of gradients."""
    options = {"bucket_cap_mb": 0.0002} if options is None else options
    return make(
        dirpath,
        model=model,
        loader=partial(train_loader, noise=True, dataset=Numbers(length=size * SAMPLES)),
        trainer={
            "devices": size,
            "strategy": strategy(**options),
            "use_distributed_sampler": True,
            "max_epochs": 2,
            **(trainer or {}),
        },
        checkpoint=checkpoint or BY_STEP,
    )


BUCKETS = {"bucket_cap_mb": 0.0002}
ON_RANKS: dict[str, tuple[int, Callable]] = {
    "3 ranks": (3, on_ranks),
    "3 ranks, find_unused_parameters": (
        3,
        partial(
            on_ranks,
            model=partial(Backwards, idle=True),
            options={**BUCKETS, "find_unused_parameters": True},
        ),
    ),
    "3 ranks, static_graph": (
        3,
        partial(
            on_ranks,
            model=partial(Backwards, idle=True, twice=True),
            options={**BUCKETS, "static_graph": True},
        ),
    ),
    "3 ranks, gradient_as_bucket_view": (
        3,
        partial(on_ranks, options={**BUCKETS, "gradient_as_bucket_view": True}),
    ),
    "3 ranks, accumulation": (
        3,
        partial(
            on_ranks,
            trainer={"accumulate_grad_batches": 3, "val_check_interval": 4},
            checkpoint={"train_time_interval": timedelta(microseconds=1)},
        ),
    ),
    "3 ranks, save_mode async": (3, partial(on_ranks, checkpoint=ASYNC)),
    "3 ranks, save_mode overlap": (3, partial(on_ranks, checkpoint=OVERLAP)),
    "3 ranks, default buckets": (3, partial(on_ranks, options={})),
    "3 ranks, FSDP2": (
        3,
        partial(
            on_ranks,
            model=InPieces,
            strategy=ModelParallelStrategy,
            options={"data_parallel_size": 3, "tensor_parallel_size": 1},
        ),
    ),
    "4 ranks": (4, partial(on_ranks, size=4)),
    "4 ranks, FSDP2": (
        4,
        partial(
            on_ranks,
            size=4,
            model=InPieces,
            strategy=ModelParallelStrategy,
            options={"data_parallel_size": 4, "tensor_parallel_size": 1},
        ),
    ),
}
CELLS.update({name: cell for name, (_, cell) in ON_RANKS.items()})

MORE_POINTS = {
    "base": (*POINTS, "on_sanity_check_start:1", "on_validation_start:2", "on_validation_end:3"),
    "gradient accumulation": (*POINTS, "on_train_batch_end:6", "on_validation_start:3"),
    "val_check_interval in steps": (*POINTS, "on_validation_start:3", "on_validation_end:4"),
    # The fifth epoch trains nothing: the statistics of the averaged weights are taken.
    "stochastic weight averaging": (*POINTS, "on_train_epoch_end:4", "on_train_batch_start:45"),
}
FEWER_POINTS = {
    **dict.fromkeys(
        ON_RANKS, (POINTS[0], "on_train_batch_start:14", "on_validation_batch_start:3")
    ),
    "save_mode async": POINTS[1:3],
    "save_mode overlap": POINTS[1:3],
    "no validation": POINTS[:3],
    "overfit_batches": ("on_train_batch_start:3", "on_train_batch_start:7", "on_train_epoch_end:2"),
}

CORE = (
    "base",
    "saved at every step",
    "augmentation",
    "workers",
    "unsized iterable",
    "val_check_interval 0.25",
    "plateau scheduler",
    "gradient accumulation",
    "early stopping",
    "finetuning",
    "two optimizers by hand",
    "max_steps",
    "save_mode async",
    "save_mode overlap",
)
"""The share that is tried with every release of Lightning."""


def points_of(name: str) -> tuple:
    """Return where a cell is killed."""
    return MORE_POINTS.get(name) or FEWER_POINTS.get(name) or POINTS


def ranks_of(name: str) -> int:
    """Return how many processes a cell has."""
    return ON_RANKS[name][0] if name in ON_RANKS else 1


class Cell:
    """A cell by name, so that it reaches the other process whatever it is made of."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, dirpath):
        return CELLS[self.name](dirpath)
