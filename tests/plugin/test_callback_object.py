"""The callback as an object: made of what configurations hold, copied, pickled, and left alone by plugins."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from _runs import At, Steps, falling, fit, go, loader, make, newest, steps_saved
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import ConfigurationError, SelectionError
from lightning_sbckpt.plugin.callback import _OF_A_FIT
from lightning_sbckpt.retention import EveryNEpochs, Where


def lowest(checkpoint):
    """Return the importance of a checkpoint."""
    return -checkpoint.meta["val_loss"]


class TestFolder:
    """The folder is that of the start, wherever the process goes."""

    @pytest.mark.parametrize("given", ["run", Path("run"), "./run"])
    def test_a_relative_folder_is_that_of_the_working_directory_at_construction(
        self, tmp_path, monkeypatch, given
    ):
        """Libraries change the working directory while a run goes on."""
        monkeypatch.chdir(tmp_path)
        run = make(given, callbacks=[At("on_train_start", 1, lambda: monkeypatch.chdir("/"))])
        assert run.callback.dirpath == tmp_path / "run"
        go(run, val=False)
        assert steps_saved(tmp_path / "run") == [12]

    def test_a_tilde_is_the_home_folder(self, tmp_path, monkeypatch):
        """As a shell has it."""
        monkeypatch.setenv("HOME", str(tmp_path))
        assert SBCheckpoint("~/run").dirpath == tmp_path / "run"

    def test_a_link_stays_one(self, tmp_path):
        """The user may move it together with what it points to."""
        (tmp_path / "link").symlink_to(tmp_path)
        assert SBCheckpoint(tmp_path / "link" / "run").dirpath == tmp_path / "link" / "run"

    def test_a_url_stays_as_it_is(self):
        """It has no working directory."""
        assert SBCheckpoint("memory://bucket/run").dirpath == "memory://bucket/run"

    def test_what_is_no_path_is_refused(self):
        """By name."""
        with pytest.raises(ConfigurationError, match="dirpath is 5, expected a path or a URL"):
            SBCheckpoint(5)


class TestKindsOfArguments:
    """An argument of the wrong kind is refused at construction, by name."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("min_key", 3),
            ("max_key", ["val_acc"]),
            ("importance_key", "val_loss"),
            ("ckpt_predicate", 1),
            ("num_to_keep", "3"),
            ("num_to_keep", True),
            ("num_to_keep", 1.5),
            ("keep_recent", "no"),
            ("keep", 5),
            ("keep", [5]),
            ("keep", [None]),
            ("keep", EveryNEpochs(2)),
            ("keep", [EveryNEpochs]),
            ("keep", {"n": 2}),
            ("every_n_epochs", "1"),
            ("every_n_epochs", 1.5),
            ("every_n_train_steps", "100"),
            ("train_time_interval", "00:10:00"),
            ("resume", "auto"),
            ("restore_best", None),
            ("recoverables", ["tokenizer"]),
            ("recoverables", {1: object()}),
            ("optional", 3),
            ("optional", [3]),
            ("skip", {"optimizer": True}),
            ("key_map", [("a", "b")]),
            ("key_map", {"a": 1}),
            ("partial", 1),
            ("keep_lr", 0.1),
            ("meta", ["a"]),
            ("meta", "a"),
            ("split_model", 7),
            ("trust_pickle", "yes"),
            ("link_unchanged", 0),
            ("local_dir", 3),
            ("storage_options", [1]),
            ("save_mode", "asink"),
            ("save_mode", None),
            ("on_save_error", True),
            ("when_in_use", 1),
            ("preemption", "SIGTERM"),
        ],
    )
    def test_it_is_refused(self, tmp_path, name, value):
        """The message has the argument's name."""
        with pytest.raises(ConfigurationError, match=name):
            SBCheckpoint(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [5, [5], "EveryNSteps", [EveryNEpochs(2)]])
    def test_what_is_no_trigger_is_refused(self, tmp_path, value):
        """A rule of retention, too, which has the name of a trigger."""
        with pytest.raises(ConfigurationError, match="triggers"):
            SBCheckpoint(tmp_path, triggers=value)

    def test_all_are_told_at_once(self, tmp_path):
        """One start, one list."""
        with pytest.raises(ConfigurationError, match=r"num_to_keep is '3'.*; meta is \['a'\]"):
            SBCheckpoint(tmp_path, num_to_keep="3", meta=["a"])

    def test_numbers_of_numpy_are_numbers(self, tmp_path):
        """A sweep draws them."""
        np = pytest.importorskip("numpy")
        callback = SBCheckpoint(
            tmp_path,
            num_to_keep=np.int64(2),
            every_n_epochs=np.int32(2),
            every_n_train_steps=np.int64(3),
            train_time_interval=np.float64(60),
        )
        assert callback.save_top_k == 2

    def test_rules_may_be_texts(self, tmp_path):
        """A configuration file has no other way to write them."""
        run = fit(tmp_path, keep=["EveryNEpochs(1)"])
        assert steps_saved(tmp_path) == [4, 8, 12]
        assert run.callback.last_model_path
        with pytest.raises(SelectionError, match="there is no rule Nonsense"):
            SBCheckpoint(tmp_path, keep=["Nonsense(1)"])


class TestHydra:
    """Lists and dictionaries of Hydra are its own, and dataclasses in them dictionaries."""

    def test_they_are_taken_for_what_they_stand_for(self, tmp_path):
        """Rules, names, prefixes, meta; interpolations are resolved."""
        omegaconf = pytest.importorskip("omegaconf")
        given = omegaconf.OmegaConf.create(
            {
                "exp": "a",
                "meta": {"exp": "${exp}", "sizes": [1, 2]},
                "skip": ["optimizer"],
                "key_map": {"a.": "b."},
                "texts": ["EveryNEpochs(1)"],
                "rules": [EveryNEpochs(1)],
            },
            flags={"allow_objects": True},
        )
        for name in ("rules", "texts"):
            fit(
                tmp_path / name,
                keep=given[name],
                meta=given.meta,
                skip=given.skip,
                key_map=given.key_map,
            )
            assert steps_saved(tmp_path / name) == [4, 8, 12]
            assert newest(tmp_path / name).meta["exp"] == "a"
            assert newest(tmp_path / name).meta["sizes"] == [1, 2]

    def test_a_list_may_hold_one_of_them(self, tmp_path):
        """A rule of the user's that is a dataclass: a configuration by Hydra's partial conversion."""
        omegaconf = pytest.importorskip("omegaconf")
        rule = omegaconf.OmegaConf.structured(Even(), flags={"allow_objects": True})
        fit(tmp_path, keep=[rule])
        assert steps_saved(tmp_path) == [8, 12]


@dataclasses.dataclass
class Even:
    """Keeps the checkpoints of every second epoch."""

    n: int = 2

    def considers(self, checkpoint):
        return True

    def keeps(self, checkpoints):
        return {each: "even" for each in checkpoints if (each.meta["epoch"] + 1) % self.n == 0}

    def rejects(self, checkpoint):
        return "odd"


def pickled(obj):
    """Return an object as another process gets it."""
    return pickle.loads(pickle.dumps(obj))


def torch_saved(obj):
    """Return an object as `torch.save` and `torch.load` give it."""
    stream = io.BytesIO()
    torch.save(obj, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS = pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled, torch_saved])


class TestCopies:
    """A copy is a callback with the same configuration that takes part in no fit."""

    OPTIONS = {  # noqa: RUF012 - nobody changes it
        "importance_key": lowest,
        "ckpt_predicate": "epoch >= 0",
        "keep": [EveryNEpochs(2), Where("val_loss < 0.2")],
        "every_n_train_steps": 3,
        "train_time_interval": timedelta(hours=1),
        "meta": {"exp": "a"},
        "preemption": True,
        "save_mode": "async",
    }

    @pytest.mark.sample(1)
    @WAYS
    def test_a_copy_fits_as_the_original_would(self, tmp_path, duplicate):
        """Before a fit, within it, and after it."""
        taken = []
        run = make(tmp_path / "a", **self.OPTIONS)
        taken.append(duplicate(run.callback))
        for hook in ("on_fit_start", "on_train_batch_end", "on_validation_end", "on_train_end"):
            run.trainer.callbacks.insert(
                0, At(hook, 2, lambda: taken.append(duplicate(run.callback)))
            )
            run.trainer.callbacks.insert(
                0, At(hook, 1, lambda: taken.append(duplicate(run.callback)))
            )
        go(run)
        taken.append(duplicate(run.callback))
        expected = steps_saved(tmp_path / "a")
        for number, one in enumerate([taken[0], taken[4], taken[-1]]):
            assert one.checkpointer is None
            again = make(tmp_path / str(number))
            one.dirpath = tmp_path / str(number)
            again.trainer.callbacks[-1] = one
            go(again)
            assert steps_saved(tmp_path / str(number)) == expected

    @pytest.mark.sample(3)
    @WAYS
    def test_a_copy_knows_what_was_best(self, tmp_path, duplicate):
        """Sweeps hand the callback back to the process that began them."""
        run = fit(tmp_path, min_key="val_loss")
        fit(tmp_path, min_key="val_loss", trainer={"max_epochs": 4})
        one = duplicate(run.callback)
        for name in ("best_model_path", "last_model_path", "best_model_score", "monitor", "mode"):
            assert getattr(one, name) == getattr(run.callback, name)
        assert one.best_k_models == run.callback.best_k_models
        assert repr(one) == f"SBCheckpoint({str(tmp_path)!r}, min_key='val_loss')"

    def test_everything_of_a_fit_is_left_out(self, tmp_path):
        """The module's methods, too, which Lightning puts on a callback."""
        before = set(vars(SBCheckpoint(tmp_path)))
        run = fit(tmp_path)
        assert set(vars(run.callback)) == {*before, "log", "log_dict"}
        assert set(run.callback.__getstate__()) == before.difference(_OF_A_FIT)
        assert set(vars(pickled(run.callback))) == before

    @pytest.mark.parametrize("when", ["before", "in", "after"])
    def test_a_trainer_is_saved_by_torch(self, tmp_path, when):
        """With its callbacks, and with none of the methods that a fit replaces."""
        taken = []
        run = make(tmp_path, callbacks=[SavesTrainer()] if when == "in" else [])
        if when == "before":
            taken.append(torch_saved(run.trainer))
        go(run)
        if when == "after":
            taken.append(torch_saved(run.trainer))
        if when == "in":
            taken += run.trainer.callbacks[0].taken
        callback = taken[0].callbacks[-1]
        assert isinstance(callback, SBCheckpoint)
        assert callback.checkpointer is None
        strategy = taken[0].strategy
        assert strategy.load_checkpoint.__func__ is type(strategy).load_checkpoint

    def test_a_subclass_keeps_its_own_attributes(self, tmp_path):
        """They are the user's."""
        one = pickled(Named(tmp_path, "a"))
        assert one.name == "a"
        assert repr(one).startswith("Named(")


class SavesTrainer(L.Callback):
    """Has torch save the Trainer while it fits."""

    def __init__(self):
        self.taken = []

    def on_fit_start(self, trainer, pl_module):
        self.taken.append(torch_saved(trainer))


class Named(SBCheckpoint):
    """A callback of the user."""

    def __init__(self, dirpath, name):
        super().__init__(dirpath)
        self.name = name


class Configured(Steps):
    """A module whose hyperparameters are those of its Trainer, callbacks among them."""

    def __init__(self, **trainer_options):
        super().__init__(falling)
        self.save_hyperparameters()


class TestHyperparameter:
    """Some libraries have the Trainer's arguments among the module's hyperparameters."""

    @pytest.mark.parametrize("save_mode", ["sync", "async"])
    def test_the_callback_may_be_one(self, tmp_path, save_mode):
        """A run saves, goes on, and a logger writes its hyperparameters."""
        for max_epochs in (2, 3):
            run = make(
                tmp_path / "run",
                trainer={"max_epochs": max_epochs, "logger": CSVLogger(tmp_path)},
                save_mode=save_mode,
                trust_pickle=True,
            )
            run = run._replace(module=Configured(callbacks=[run.callback]))
            go(run)
        assert steps_saved(tmp_path / "run") == [12]
        folder = run.callback.last_model_path
        assert "SBCheckpoint" in (Path(folder) / "hparams.yaml").read_text()
        assert "callbacks" in (Path(run.trainer.logger.log_dir) / "hparams.yaml").read_text()
        loaded = Configured.load_from_checkpoint(folder, weights_only=False)
        assert isinstance(loaded.hparams["callbacks"][0], SBCheckpoint)


class Mine(AsyncCheckpointIO):
    """A plugin of the user."""


class TestCheckpointIO:
    """Plugins of the user stay where they look for them, and get all that Lightning has for them."""

    def test_the_strategy_has_the_plugin_of_the_user(self, tmp_path):
        """While a fit goes on, too."""
        plugin, seen = Mine(), []
        run = make(tmp_path, trainer={"plugins": [plugin]})
        look = At("on_train_start", 1, lambda: seen.append(run.trainer.strategy.checkpoint_io))
        run.trainer.callbacks.insert(0, look)
        go(run)
        assert seen == [plugin]

    @pytest.mark.parametrize("plugin", [None, AsyncCheckpointIO])
    @pytest.mark.parametrize("what", ["test", "fit"])
    def test_a_file_is_read_as_lightning_would(self, tmp_path, plugin, what):
        """`weights_only=False` reaches a plugin that takes it among others."""
        file = tmp_path / "a.ckpt"
        alone = L.Trainer(
            max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        alone.fit(WithObject(), loader(), loader(1))
        alone.save_checkpoint(file)
        run = make(
            tmp_path / "run",
            module=WithObject(),
            trainer={"max_epochs": 1, "plugins": [plugin()] if plugin else None},
            trust_pickle=True,
        )
        options = {} if L.__version__ < "2.6" else {"weights_only": False}
        if what == "test":
            run.trainer.test(run.module, loader(1), ckpt_path=file, verbose=False, **options)
        else:
            run.trainer.fit(run.module, loader(), loader(1), ckpt_path=file, **options)
        assert run.module.steps == 4


class Own:
    """What only pickle can hold."""


class WithObject(Steps):
    """A module that saves it."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = Own()
