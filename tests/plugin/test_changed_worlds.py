"""A run that was changed between two starts resumes, or says at once everything that doesn't fit."""

from __future__ import annotations

import exact_cells
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader

from lightning_sbckpt.errors import MismatchError


class Renamed(exact_cells.Model):
    """The base model with another name for its body."""

    def __init__(self):
        super().__init__()
        self.trunk, head = self.body, self.head
        del self.body, self.head
        self.head = head  # The optimizer is given the parameters in the same order.

    def forward(self, x):
        return self.head(self.trunk(x))


class Wider(exact_cells.Model):
    """The base model with another head and one layer more."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, exact_cells.CLASSES + 1)
        self.extra = nn.Linear(2, 2)


class WithSGD(exact_cells.Model):
    """The base model with another optimizer and scheduler."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class OtherRate(exact_cells.Model):
    """The base model with another learning rate."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.25)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)]


class FirstRate(OtherRate):
    """The same with the rate it was begun with."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)]


def fit(dirpath, model=exact_cells.Model, epochs=1, restore_best=False, **checkpoint):
    """Train to the end of an epoch, resuming if there is something to resume."""
    trainer, module, data = exact_cells.make(
        dirpath,
        model=model,
        trainer={"max_epochs": epochs},
        checkpoint={"restore_best": restore_best, **checkpoint},
    )
    trainer.fit(module, **data)
    return trainer, module


def saved_weights(trainer):
    """Return the weights in the newest checkpoint."""
    path = trainer.checkpoint_callback.last_model_path
    return torch.load(f"{path}/model.ckpt", weights_only=True)


def test_every_mismatch_of_the_model_is_named_at_once_with_the_ways_on(tmp_path):
    """Both shapes, what is only here, what is only there, and the options that would let it pass."""
    fit(tmp_path)
    with pytest.raises(MismatchError) as caught:
        fit(tmp_path, Wider, epochs=2)
    message = str(caught.value)
    assert "head.weight: (3, 8) in the checkpoint, (4, 8) in the module" in message
    assert "head.bias: (3,) in the checkpoint, (4,) in the module" in message
    assert "extra.weight: only in the module" in message
    assert "key_map=" in message and "partial=True" in message and "skip=['model']" in message


def test_renamed_parameters_are_found_by_a_key_map(tmp_path):
    """A prefix in the checkpoint stands for another one in the module."""
    before = saved_weights(fit(tmp_path)[0])
    with pytest.raises(MismatchError, match=r"trunk\.0\.weight: only in the module"):
        fit(tmp_path, Renamed, epochs=1)
    _, module = fit(tmp_path, Renamed, epochs=1, key_map={"body.": "trunk."})
    assert torch.equal(module.trunk[0].weight, before["body.0.weight"])


def test_what_fits_is_loaded_and_the_rest_stays(tmp_path):
    """partial=True takes the parameters of the same name and shape, and reports the others."""
    before = saved_weights(fit(tmp_path)[0])
    trainer, module = fit(
        tmp_path, Wider, epochs=1, partial=True, skip=["optimizer", "lr_scheduler"]
    )
    assert torch.equal(module.body[0].weight, before["body.0.weight"])
    assert module.head.weight.shape == (exact_cells.CLASSES + 1, 8)
    skipped = "\n".join(trainer.checkpoint_callback.resume_report.skipped)
    assert "head.weight: (3, 8) in the checkpoint" in skipped
    assert "optimizer (asked for by skip)" in skipped


def test_another_optimizer_is_refused_by_name_and_can_be_begun_anew(tmp_path):
    """Not by a KeyError for one of its options, as Lightning alone would."""
    fit(tmp_path)
    with pytest.raises(MismatchError) as caught:
        fit(tmp_path, WithSGD, epochs=2)
    message = str(caught.value)
    assert "optimizer: AdamW in the checkpoint, SGD in this run" in message
    assert "lr_scheduler: OneCycleLR in the checkpoint, ExponentialLR in this run" in message
    assert "skip=['optimizer', 'lr_scheduler']" in message
    trainer, _ = fit(tmp_path, WithSGD, epochs=2, skip=["optimizer", "lr_scheduler"])
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.global_step == 2 * exact_cells.BATCHES


def test_a_new_learning_rate_is_taken_when_asked_for(tmp_path):
    """By default the checkpoint's rate goes on, as resuming exactly means."""
    fit(tmp_path, FirstRate)
    trainer, _ = fit(tmp_path, OtherRate, epochs=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    trainer, _ = fit(tmp_path, OtherRate, epochs=3, keep_lr=True)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    assert any("keep_lr" in line for line in trainer.checkpoint_callback.resume_report.skipped)


def test_a_compiled_module_takes_the_weights_of_one_that_was_not(tmp_path):
    """The names that torch.compile adds are no difference, in either direction."""

    def compiled():
        module = exact_cells.Model()
        # What torch.compile makes of a submodule, without the compiler.
        module.body = torch._dynamo.OptimizedModule(module.body, torch._dynamo.disable)
        return module

    before = saved_weights(fit(tmp_path)[0])
    _, module = fit(tmp_path, compiled, epochs=1)
    assert "body._orig_mod.0.weight" in module.state_dict()
    assert torch.equal(module.state_dict()["body._orig_mod.0.weight"], before["body.0.weight"])
    trained = saved_weights(fit(tmp_path, compiled, epochs=2)[0])
    _, plain = fit(tmp_path, epochs=2)
    assert torch.equal(plain.body[0].weight, trained["body._orig_mod.0.weight"])


def test_adapters_alone_are_saved_and_resumed(tmp_path):
    """A frozen backbone that the module leaves out of its checkpoint comes from the module again."""

    class Adapted(exact_cells.Model):
        strict_loading = False

        def __init__(self):
            super().__init__("none")
            self.body.requires_grad_(False)

        def on_save_checkpoint(self, checkpoint):
            for key in [key for key in checkpoint["state_dict"] if key.startswith("body.")]:
                del checkpoint["state_dict"][key]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters(), lr=0.01)

    trainer, module = fit(tmp_path, Adapted)
    assert sorted(saved_weights(trainer)) == ["head.bias", "head.weight"]
    head, body = module.head.weight.clone(), module.body[0].weight.clone()
    _, again = fit(tmp_path, Adapted, epochs=1)
    assert torch.equal(again.head.weight, head) and torch.equal(again.body[0].weight, body)


def test_a_part_is_left_out_by_its_name(tmp_path):
    """Random states, callbacks, whatever has a file can be skipped, and the report says so."""
    fit(tmp_path)
    trainer, _ = fit(tmp_path, epochs=2, skip=["rng", "callbacks"])
    report = trainer.checkpoint_callback.resume_report
    assert "rng (asked for by skip)" in report.skipped
    assert "rng" not in report.restored and "model" in report.restored


class Counting(L.Callback):
    """Counts epochs, and keeps the count in the checkpoint."""

    def __init__(self):
        self.epochs = 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]


@pytest.mark.parametrize(("skip", "counted"), [([], 2), (["callbacks"], 1)])
def test_a_part_that_is_left_out_is_not_loaded(tmp_path, skip, counted):
    """The report does not only say so."""
    for epochs in (1, 2):
        callback = Counting()
        trainer, module, data = exact_cells.make(
            tmp_path,
            callbacks=lambda callback=callback: [callback],
            trainer={"max_epochs": epochs},
            checkpoint={"skip": skip},
        )
        trainer.fit(module, **data)
    assert callback.epochs == counted


class StopFit(L.Callback):
    """Ends a fit before its n-th batch."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            raise ZeroDivisionError


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("before", "after", "samples", "batches", "workers"),
    [
        # Ten batches of four, and the last of them is not trained on.
        (4, 8, 40, [4], 0),
        (4, 8, 40, [4], 2),
        (4, 2, 40, [18, 19], 0),
        (4, 40, 40, [0], 0),
        (4, 4, 16, [3], 0),
    ],
)
def test_an_epoch_with_other_batches_ends_with_its_validation(
    tmp_path, before, after, samples, batches, workers
):
    """It goes on after as many samples; one batch is left of it, however few there are now."""
    trained, validated = [], []

    class Recording(exact_cells.Model):
        def training_step(self, batch, batch_idx):
            trained.append((self.current_epoch, batch_idx))
            return super().training_step(batch, batch_idx)

        def on_validation_end(self):
            validated.append(self.current_epoch)

    def fit_with(batch_size, length, stop):
        trainer, module, data = exact_cells.make(
            tmp_path,
            model=Recording,
            callbacks=lambda: [StopFit(stop), EarlyStopping("val_loss")],
            trainer={"max_epochs": 1, "num_sanity_val_steps": 0},
            # Another length is other data, which is refused by default in one process.
            checkpoint={"every_n_train_steps": 1, "on_change": "warn"},
        )
        numbers = exact_cells.Numbers(length=length)
        data["train_dataloaders"] = DataLoader(
            numbers, batch_size, shuffle=True, num_workers=workers if stop is None else 0
        )
        trainer.fit(module, **data)
        return "\n".join(trainer.checkpoint_callback.resume_report.notes)

    with pytest.raises(ZeroDivisionError):
        fit_with(before, 40, 10)
    trained.clear()
    notes = fit_with(after, samples, None)
    if before != after:
        said = (
            f"its batch size was {before} and is {after}, so the run goes on, but not bit for bit"
        )
        assert said in notes
    assert trained == [(0, batch) for batch in batches]
    assert validated == [0]
