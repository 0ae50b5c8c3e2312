"""Batches and logged values may be tensors of a class of its own, with operations of its own."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from _runs import raise_at
from torch.utils.data import DataLoader, default_collate

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.plugin.data.iteration import mark_of


class Image(torch.Tensor):
    """Refuses, as one with a description of each part would, whatever takes it apart."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.flatten, torch.Tensor.__getitem__, torch.Tensor.view):
            raise ValueError("the parts have other descriptions")
        return super().__torch_function__(function, types, args, kwargs)


class Wrapped(torch.Tensor):
    """Has no values of its own, and says what each operation does to those it holds."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of what is wrapped")


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(folder, *callbacks):
    torch.manual_seed(3)
    numbers = torch.arange(36.0).reshape(12, 3) / 36

    def images(items):
        return default_collate(items).as_subclass(Image)

    loader = DataLoader(numbers, 2, shuffle=True, collate_fn=images)
    checkpoint = SBCheckpoint(folder, min_key="val_loss", every_n_train_steps=2, restore_best=False)
    net = Net()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, checkpoint],
    )
    trainer.fit(net, loader, DataLoader(numbers, 4, collate_fn=images))
    return net, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_batches_and_losses_of_a_tensor_subclass_resume(tmp_path):
    """A run goes on within an epoch to the same weights and metrics as one that was not stopped."""
    net, metrics = fit(tmp_path / "through")
    with pytest.raises(RuntimeError, match="stopped here"):
        fit(tmp_path / "stopped", raise_at("on_train_batch_end", 9, RuntimeError("stopped here")))
    resumed, same = fit(tmp_path / "stopped")
    assert all(
        torch.equal(*pair) for pair in zip(net.parameters(), resumed.parameters(), strict=True)
    )
    assert same == metrics


def test_marks_tell_batches_of_a_tensor_subclass_apart():
    """The values count, whatever the class does when it is sliced."""
    ones, zeros = (value.as_subclass(Image) for value in (torch.ones(4), torch.zeros(4)))
    assert mark_of([ones]) == mark_of([ones.clone()])
    assert mark_of([ones]) != mark_of([zeros])


def test_marks_take_a_tensor_without_values_of_its_own():
    """Only its shape is known of a tensor that wraps another."""
    assert mark_of(Wrapped(torch.ones(4))) == mark_of(Wrapped(torch.zeros(4)))
    assert mark_of(Wrapped(torch.ones(4))) != mark_of(Wrapped(torch.ones(5)))
