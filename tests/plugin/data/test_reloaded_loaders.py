"""Loaders that Lightning has made anew every few epochs begin as they were made, after a resume, too."""

from __future__ import annotations

from contextlib import suppress

import lightning as L
import pytest
import torch
from _runs import make
from _stopped import DATA, Net, StopAt, StoppedError
from torch.utils.data import DataLoader


class Reloading(Net):
    """Seeds each new loader by the epoch, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.held = torch.Generator().manual_seed(5)
        self.loader = DataLoader(DATA, 4, shuffle=True, generator=self.held)

    def seeded(self):
        generator = torch.Generator().manual_seed(self.trainer.current_epoch)
        return DataLoader(DATA, 4, shuffle=True, generator=generator)

    train_dataloader = val_dataloader = seeded

    def training_step(self, batch, index):
        self.seen.append((self.trainer.global_step, batch[0].sum().item()))
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        if not self.trainer.sanity_checking:
            self.seen.append((self.trainer.global_step, "validation", batch[0].sum().item()))


class HeldGenerator(Reloading):
    """Gives each new loader the same generator."""

    def train_dataloader(self):
        return DataLoader(DATA, 4, shuffle=True, generator=self.held)


class HeldLoader(Reloading):
    """Makes no new loader when it is asked for one."""

    def train_dataloader(self):
        return self.loader


class Counting(torch.utils.data.Dataset):
    """Gives other samples in each epoch."""

    def __init__(self):
        self.given = 0

    def __getitem__(self, index):
        self.given += 1
        return DATA[index][0] + self.given, DATA[index][1]

    def __len__(self):
        return len(DATA)


class HeldDataset(Reloading):
    """Gives each new loader a dataset that counts on."""

    def __init__(self):
        super().__init__()
        self.data = Counting()

    def train_dataloader(self):
        return DataLoader(self.data, 4)


class NewDataset(Reloading):
    """Gives each new loader a dataset that counts from zero."""

    def train_dataloader(self):
        return DataLoader(Counting(), 4)


def seen(dirpath, kind, every, stop=None):
    """Fit, until a batch or to the end; return what was seen at each step."""
    L.seed_everything(7, verbose=False)
    module = kind()
    options = {"reload_dataloaders_every_n_epochs": every, "max_epochs": 4}
    run = make(
        dirpath,
        module=module,
        callbacks=[] if stop is None else [StopAt(stop)],
        trainer={**options, "num_sanity_val_steps": 0},
        every_n_train_steps=1,
        restore_best=False,
    )
    with suppress(StoppedError):
        run.trainer.fit(module)
    return module.seen


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", [Reloading, HeldGenerator, HeldLoader, HeldDataset, NewDataset])
@pytest.mark.parametrize(("every", "stop"), [(1, 5), (1, 7), (2, 9), (2, 13)])
def test_loaders_made_anew_give_what_they_would_have(tmp_path, kind, every, stop):
    """Between two epochs and within one; what loaders share goes on, what is new begins anew."""
    whole = seen(tmp_path / "whole", kind, every)
    seen(tmp_path / "stopped", kind, every, stop)
    resumed = seen(tmp_path / "stopped", kind, every)
    assert resumed == whole[-len(resumed) :]
    assert 0 < len(resumed) < len(whole)
