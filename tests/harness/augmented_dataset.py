"""Datasets for workers that are spawned: importing this imports nothing slow."""

# The legacy global state of numpy is part of what is tested.
# ruff: noqa: NPY002

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

SAMPLES = 22


class Augmented(Dataset):
    """Draws from all three global streams for every sample."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        drawn = [torch.rand(()).item(), np.random.rand(), np.random.randn(), random.random()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class KnowsItsWorker(Augmented):
    """Gives the number and the seed of the worker that loaded it."""

    def __getitem__(self, index):
        info = get_worker_info()
        return torch.cat([super().__getitem__(index), torch.tensor([info.id, info.seed % 1000])])
