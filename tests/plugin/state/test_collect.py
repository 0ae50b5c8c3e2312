"""Every object has a file of its own, which plain torch reads, and gets its state back from it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from _runs import Steps, fit, go, loader, make, newest, saved, steps_saved
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightning_sbckpt import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
    torch_parameter_transfer,
)
from lightning_sbckpt.errors import ConfigurationError, HookError, MismatchError

ONE = {"max_epochs": 1}


def opened(dirpath, name):
    """Return what plain torch reads from a file of the newest checkpoint."""
    return torch.load(newest(dirpath).path / f"{name}.ckpt", weights_only=True)


class Scaling(Precision):
    """A precision plugin with a state, as GradScaler's."""

    def __init__(self, scale=0):
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


class Data(L.LightningDataModule):
    """A datamodule with a state and a hyperparameter."""

    def __init__(self, epochs=0, size=1):
        super().__init__()
        self.save_hyperparameters("size")
        self.epochs = epochs

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(1)

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


class Counts(L.Callback):
    """A callback with a state, and one more thing in the checkpoint."""

    def __init__(self, number=0):
        self.number = number
        self.note = None

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["note of the callback"] = f"{self.number} times"

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.note = checkpoint["note of the callback"]


class Everything(Steps):
    """Two optimizers, two schedulers, hyperparameters, and a note in the checkpoint."""

    def __init__(self, width=2, note=None):
        super().__init__()
        self.save_hyperparameters("width")
        self.automatic_optimization = False
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.BatchNorm1d(width))
        self.note = note

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.weight.sum() + self.encoder(torch.ones(2, 1)).sum())
        first.step()
        second.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        first = torch.optim.SGD([self.weight], lr=1.0)
        second = torch.optim.Adam(self.encoder.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler
        return [first, second], [schedule.StepLR(first, 100), schedule.ExponentialLR(second, 0.9)]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note of the module"] = {"text": self.note, "tensor": torch.ones(2)}

    def on_load_checkpoint(self, checkpoint):
        self.note = checkpoint["note of the module"]["text"]


class Number:
    """A recoverable with a number."""

    def __init__(self, number=0):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def everything(dirpath, max_epochs, number=0):
    """Fit a run in which everything there is has a state."""
    callback, precision, data = Counts(number), Scaling(number), Data(epochs=number, size=3)
    run = fit(
        dirpath,
        module=Everything(width=3, note=number),
        callbacks=[callback],
        data=data,
        recoverables={"tokenizer": Number(number)},
        trainer={"max_epochs": max_epochs, "plugins": [precision]},
    )
    return run, callback, precision, data


class TestOneFileEach:
    """What is in a checkpoint folder."""

    FILES = (
        "callbacks",
        "datamodule",
        "extras",
        "hparams",
        "loaders",
        "loops",
        "lr_scheduler",
        "lr_scheduler_1",
        "metrics",
        "model",
        "optimizer",
        "optimizer_1",
        "precision",
        "rng",
        "tokenizer",
    )

    @pytest.fixture
    def folder(self, tmp_path):
        """The checkpoint of a run in which everything has a state."""
        everything(tmp_path, 1, number=7)
        return tmp_path

    def test_every_object_has_a_file(self, folder):
        """Named after it; the second optimizer and scheduler with a number."""
        assert tuple(newest(folder).paramfiles) == tuple(sorted(self.FILES)) == self.FILES

    @pytest.mark.sample(10)
    @pytest.mark.parametrize("name", FILES)
    def test_plain_torch_opens_the_file(self, folder, name):
        """With weights_only=True, and nothing of ours in what it returns."""
        state = opened(folder, name)
        assert state
        assert "lightning_sbckpt." not in {type(value).__module__ for value in walk(state)}

    def test_each_has_the_objects_own_state(self, folder):
        """And nothing of the others."""
        assert set(opened(folder, "model")) == {
            "weight",
            "encoder.0.weight",
            "encoder.0.bias",
            "encoder.1.weight",
            "encoder.1.bias",
            "encoder.1.running_mean",
            "encoder.1.running_var",
            "encoder.1.num_batches_tracked",
        }
        assert opened(folder, "optimizer")["param_groups"][0]["lr"] == 1.0
        assert opened(folder, "optimizer_1")["param_groups"][0]["betas"] == (0.9, 0.999)
        assert opened(folder, "lr_scheduler")["step_size"] == 100
        assert opened(folder, "lr_scheduler_1")["gamma"] == 0.9
        assert opened(folder, "callbacks") == {"Counts": {"number": 7}}
        assert opened(folder, "precision") == {"Scaling": {"scale": 7}}
        assert opened(folder, "datamodule") == {"Data": {"epochs": 7}}
        assert opened(folder, "tokenizer") == {"number": 7}
        assert opened(folder, "hparams")["hyper_parameters"] == {"width": 3}
        assert opened(folder, "hparams")["datamodule_hyper_parameters"] == {"size": 3}
        extras = opened(folder, "extras")
        assert set(extras) == {"note of the module", "note of the callback"}
        assert extras["note of the callback"] == "7 times"
        assert opened(folder, "loops")["global_step"] == 8

    def test_everything_comes_back(self, folder):
        """On resume, in another process's place: new objects have the old states."""
        run, callback, precision, data = everything(folder, 2)
        assert run.trainer.current_epoch == 2
        assert (callback.number, callback.note) == (7, "7 times")
        assert (precision.scale, data.epochs, run.module.note) == (7, 7, 7)
        assert opened(folder, "tokenizer") == {"number": 7}
        assert set(run.callback.resume_report.restored) == set(self.FILES)

    def test_what_has_no_state_has_no_file(self, tmp_path):
        """A small run has a small folder."""
        fit(tmp_path, trainer=ONE)
        files = set(newest(tmp_path).paramfiles)
        assert files == {"loaders", "loops", "metrics", "model", "optimizer", "rng"}


def walk(value):
    """Yield a nested value and all within it."""
    yield value
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        for item in inside:
            yield from walk(item)


class TestRecoverables:
    """Objects of the user."""

    def test_a_mapping_or_a_function_gives_them(self, tmp_path):
        """Both save and load."""
        for name, wrap in {"a": lambda given: given, "b": lambda given: lambda *_: given}.items():
            fit(tmp_path / name, recoverables=wrap({"n": Number(3)}), trainer=ONE)
            number = Number()
            fit(tmp_path / name, recoverables=wrap({"n": number}))
            assert number.number == 3

    def test_the_function_gets_trainer_and_module(self, tmp_path):
        """So that it can name what is inside them."""
        seen = []

        def give(trainer, module):
            seen.append((type(trainer), type(module)))
            return {}

        fit(tmp_path, recoverables=give, trainer=ONE)
        assert set(seen) == {(L.Trainer, Steps)}

    def test_module_and_datamodule_offer_theirs(self, tmp_path):
        """In a method configure_recoverables."""

        class Offers(Steps):
            def __init__(self, number=0):
                super().__init__()
                self.extra = Number(number)

            def configure_recoverables(self):
                return {"of_module": self.extra}

        class OffersData(Data):
            def __init__(self, number=0):
                super().__init__()
                self.extra = Number(number)

            def configure_recoverables(self):
                return {"of_data": self.extra}

        fit(tmp_path, module=Offers(1), data=OffersData(2), trainer=ONE)
        assert (opened(tmp_path, "of_module"), opened(tmp_path, "of_data")) == (
            {"number": 1},
            {"number": 2},
        )
        module, data = Offers(), OffersData()
        fit(tmp_path, module=module, data=data)
        assert (module.extra.number, data.extra.number) == (1, 2)

    def test_hooks_of_their_class_are_used(self, tmp_path):
        """As in the core."""

        @register_checkpoint_hooks
        class Words:
            def __init__(self, words=()):
                self.words = list(words)

            @mark_as_saver
            def save(self, path):
                path.write_text("\n".join(self.words))

            @mark_as_loader
            def load(self, path, end_of_epoch):
                self.words = path.read_text().split("\n")

        fit(tmp_path, recoverables={"words": Words(["a", "b"])}, trainer=ONE)
        assert (newest(tmp_path).path / "words.ckpt").read_text() == "a\nb"
        words = Words()
        fit(tmp_path, recoverables={"words": words})
        assert words.words == ["a", "b"]

    @pytest.mark.parametrize(
        ("offered", "message"),
        [({"optimizer": Number()}, "SBCheckpoint uses"), ({"n": Number()}, "'n' twice")],
    )
    def test_a_name_that_is_taken_is_refused_before_training(self, tmp_path, offered, message):
        """Also one that only configure_recoverables offers."""

        class Offers(Steps):
            def configure_recoverables(self):
                return offered

        run = make(tmp_path, module=Offers(), recoverables={"n": Number()})
        with pytest.raises(ConfigurationError, match=message):
            go(run)
        assert run.module.steps == 0

    def test_what_a_checkpoint_lacks_is_listed_at_once(self, tmp_path):
        """All of it; nothing is trained."""
        fit(tmp_path, trainer=ONE)
        run = make(tmp_path, recoverables={"one": Number(), "two": Number()})
        with pytest.raises(MismatchError, match=r"no files for the recoverables 'one', 'two'"):
            go(run)
        assert (run.module.steps, steps_saved(tmp_path)) == (4, [4])

    def test_an_optional_one_may_be_missing(self, tmp_path):
        """The others are restored."""
        fit(tmp_path, recoverables={"one": Number(1)}, trainer=ONE)
        one, two = Number(), Number(5)
        with pytest.warns(UserWarning, match="no file for 'two'"):
            fit(tmp_path, recoverables={"one": one, "two": two}, optional=["two"])
        assert (one.number, two.number) == (1, 5)

    def test_what_can_not_be_saved_is_named(self, tmp_path):
        """With what to do about it."""
        with pytest.raises(HookError, match=r"'thing' \(object\).*register_checkpoint_hooks"):
            fit(tmp_path, recoverables={"thing": object()})
        assert not saved(tmp_path)

    def test_a_recoverable_that_draws_random_numbers_changes_nothing(self, tmp_path):
        """A run with saves is the run without."""

        class Draws(Number):
            def state_dict(self):
                return {"number": torch.rand(1).item()}

        class Random(Steps):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * torch.rand(1)

        weights = []
        for name, options in (("a", {}), ("b", {"every_n_train_steps": 1})):
            L.seed_everything(1, verbose=False)
            run = fit(tmp_path / name, module=Random(), recoverables={"draws": Draws()}, **options)
            weights.append(run.module.weight.item())
        assert weights[0] == weights[1]


class Split(Steps):
    """Has submodules to be saved apart."""

    def __init__(self, features=2):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(1, features), nn.BatchNorm1d(features))
        self.decoder = nn.ModuleDict({"head": nn.Linear(features, 1)})


class TestSplitModel:
    """Submodules with files of their own."""

    NAMES = ("encoder", "decoder.head")

    def test_the_file_is_the_submodules_own_state_dict(self, tmp_path):
        """The model's file has the rest."""
        module = Split()
        fit(tmp_path, module=module, split_model=self.NAMES, trainer=ONE)
        assert set(opened(tmp_path, "encoder")) == set(module.encoder.state_dict())
        assert set(opened(tmp_path, "decoder.head")) == {"weight", "bias"}
        assert set(opened(tmp_path, "model")) == {"weight"}

    def test_it_loads_straight_into_the_submodule(self, tmp_path, caplog):
        """By parameter transfer, for somebody who needs only that; every key fits."""
        module = Split()
        fit(tmp_path, module=module, split_model=self.NAMES, trainer=ONE)
        fresh = Split().encoder
        torch_parameter_transfer(fresh, newest(tmp_path).paramfiles["encoder"])
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                fresh.state_dict().values(), module.encoder.state_dict().values(), strict=True
            )
        )
        assert "transfer to" not in caplog.text

    @pytest.mark.parametrize("then", [(), ("encoder",), NAMES])
    def test_a_resume_puts_it_together(self, tmp_path, then):
        """Whatever is to be split from then on."""
        first = Split()
        fit(tmp_path, module=first, split_model=self.NAMES, trainer=ONE)
        second = Split()
        run = fit(tmp_path, module=second, split_model=then, trainer={"max_epochs": 2})
        assert torch.equal(first.encoder[0].weight, second.encoder[0].weight)
        assert torch.equal(first.decoder["head"].bias, second.decoder["head"].bias)
        assert second.steps == 8
        assert {"encoder", "decoder.head"} <= {*run.callback.resume_report.restored}
        assert run.callback.resume_report.skipped == []

    def test_load_from_checkpoint_and_the_best_put_it_together(self, tmp_path):
        """By path, and at the end of the fit."""
        module = Split(3)
        run = fit(tmp_path, module=module, split_model=self.NAMES, min_key="val_loss")
        loaded = Split.load_from_checkpoint(run.callback.best_model_path)
        assert torch.equal(loaded.encoder[0].weight, module.encoder[0].weight)
        assert loaded.steps == module.steps == 12

    def test_an_unknown_submodule_is_refused_before_training(self, tmp_path):
        """With the names that there are."""
        run = make(tmp_path, module=Split(), split_model=["encoder", "coder"])
        with pytest.raises(ConfigurationError, match=r"'coder'.*Its top level has: decoder, enc"):
            go(run)
        assert run.module.steps == 0

    def test_a_submodule_made_in_configure_model_is_known(self, tmp_path):
        """The check waits for it."""

        class Late(Steps):
            def configure_model(self):
                if not hasattr(self, "late"):
                    self.late = nn.Linear(2, 2)

        fit(tmp_path, module=Late(), split_model=["late"], trainer=ONE)
        assert set(opened(tmp_path, "late")) == {"weight", "bias"}


class Custom:
    """What only pickle can hold."""

    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return isinstance(other, Custom) and other.number == self.number

    __hash__ = None


class Pickled(Steps):
    """Puts something into the checkpoint that only pickle can hold."""

    def __init__(self, number=0):
        super().__init__()
        self.custom = Custom(number)
        self.plain = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["custom"] = self.custom
        checkpoint["plain"] = 5

    def on_load_checkpoint(self, checkpoint):
        self.custom = checkpoint["custom"]
        self.plain = checkpoint["plain"]


class TestPickle:
    """State that only pickle can hold lies apart, and is read by the user whose runs wrote it."""

    def test_the_file_beside_it_opens_with_plain_torch(self, tmp_path):
        """With None in its place."""
        fit(tmp_path, module=Pickled(), trainer=ONE)
        assert opened(tmp_path, "extras") == {"custom": None, "plain": 5}
        assert "extras+pickled.ckpt" in {path.name for path in newest(tmp_path).path.iterdir()}

    def test_a_resume_gets_it_back(self, tmp_path, caplog):
        """Nothing is asked for, nothing warned of."""
        fit(tmp_path, module=Pickled(3), trainer=ONE)
        run = fit(tmp_path, module=Pickled(4))
        assert run.module.custom == Custom(3)
        assert run.callback.resume_report.skipped == []
        assert "pickle" not in caplog.text

    def test_numpy_and_paths_need_no_pickle(self, tmp_path):
        """They come back as what they were."""
        import pathlib

        import numpy as np

        class Arrays(Steps):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["given"] = {"array": np.arange(3), "path": pathlib.Path("a/b")}

            def on_load_checkpoint(self, checkpoint):
                self.given = checkpoint["given"]

        fit(tmp_path, module=Arrays(), trainer=ONE)
        assert not list(newest(tmp_path).path.glob("*+pickled*"))
        module = Arrays()
        fit(tmp_path, module=module)
        assert module.given["array"].tolist() == [0, 1, 2]
        assert module.given["path"] == pathlib.Path("a/b")
