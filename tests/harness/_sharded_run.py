"""Ranks that train in pieces and save."""

from __future__ import annotations

import torch
from _sharded_ranks import make, train, whole


def save_after_training(folder, rank):
    checkpointer, model, optimizer = make(folder)
    train(model, optimizer, 3)
    checkpointer.save_checkpoint({"loss": 0.5}, name="a")
    state = whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    if rank == 0:
        torch.save(state, folder.parent / "expected.pt")
    train(model, optimizer, 2, first=3)
    if rank == 0:
        torch.save(whole_of_rank_zero(model, optimizer), folder.parent / "later0.pt")
    else:
        whole_of_rank_zero(model, optimizer)


def whole_of_rank_zero(model, optimizer):
    return whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
