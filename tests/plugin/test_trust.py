"""A run gets back what it saved: never None in the place of what could not be read."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import os
from argparse import Namespace
from pathlib import Path

import _ranks
import lightning as L
import numpy as np
import pytest
import torch
from _foreign import forget_manifest
from _releases import since, version_of
from _runs import Steps, fit, newest, raise_at
from torchmetrics import Metric

from lightning_sbckpt import SBCheckpoint, trusting_pickle
from lightning_sbckpt.errors import MismatchError, UntrustedPickleError
from lightning_sbckpt.plugin.export import from_lightning, to_lightning

ONE = {"max_epochs": 1}
EARLY = {"every_n_train_steps": 1}


class Kind(enum.Enum):
    """A choice among hyperparameters."""

    TANH = "tanh"


@dataclasses.dataclass
class Vocabulary:
    """An object that a module keeps in its checkpoint."""

    words: list[str]


class Keeps(Steps):
    """Puts an object into the checkpoint, as pytorch-forecasting does with its loss."""

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.vocabulary = Vocabulary([*words])
        self.given: list[object] = []

    def on_save_checkpoint(self, checkpoint):
        checkpoint["special"] = {"vocabulary": self.vocabulary, "number": 5}

    def on_load_checkpoint(self, checkpoint):
        self.given.append(checkpoint["special"])
        self.vocabulary = checkpoint["special"]["vocabulary"]


class Remembers(L.Callback):
    """A callback whose state holds an object."""

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        self.vocabulary = Vocabulary([*words])

    def state_dict(self):
        return {"vocabulary": self.vocabulary}

    def load_state_dict(self, state):
        self.vocabulary = state["vocabulary"]


class Labelled(torch.Tensor):
    """A subclass of a tensor, as a metric may be logged as."""


class Counting(Metric):
    """A metric whose state is a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx=None)

    def update(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def compute(self) -> torch.Tensor:
        return torch.stack(self.seen).sum()


class Logs(Steps):
    """Logs a subclass of a tensor, and a torchmetrics metric."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = Counting()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        value = torch.ones(()).as_subclass(Labelled)
        self.log("labelled", value, on_step=False, on_epoch=True)
        self.counting.update(torch.ones(()))
        self.log("counted", self.counting, on_step=False, on_epoch=True)
        return loss


class Wide(Steps):
    """A module with hyperparameters of all kinds."""

    def __init__(self, **given: object) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that was never stopped, whose module and callback keep an object."""
    folder = tmp_path_factory.mktemp("kept")
    callback = Remembers(("c",))
    run = fit(
        folder, module=Keeps(("a", "b")), callbacks=[callback], min_key="val_loss", trainer=ONE
    )
    return folder, run, callback


class TestNeverNone:
    """At every door."""

    def test_after_a_fit_that_was_never_stopped(self, kept):
        """The best weights are restored, and with them what hooks are given."""
        _, run, _ = kept
        assert run.module.given == [{"vocabulary": Vocabulary(["a", "b"]), "number": 5}]
        assert run.module.vocabulary == Vocabulary(["a", "b"])

    def test_in_a_resume(self, kept):
        """Of a module and of a callback; nothing is asked for."""
        folder, _, _ = kept
        callback = Remembers()
        run = fit(folder, module=Keeps(), callbacks=[callback], min_key="val_loss")
        assert run.module.vocabulary == Vocabulary(["a", "b"])
        assert callback.vocabulary == Vocabulary(["c"])
        assert run.callback.resume_report.skipped == []

    def test_in_test_and_load_from_checkpoint(self, kept):
        """Both hand the whole checkpoint to the module's hook."""
        folder, _, _ = kept
        assert Keeps.load_from_checkpoint(newest(folder).path).vocabulary.words == ["a", "b"]
        module = Keeps()
        trainer = L.Trainer(
            logger=False, enable_progress_bar=False, callbacks=[SBCheckpoint(folder)]
        )
        trainer.validate(module, torch.zeros(1, 1), ckpt_path=newest(folder).path, verbose=False)
        assert module.vocabulary.words == ["a", "b"]

    def test_another_user_is_told_and_nothing_is_handed_on(self, kept, tmp_path, another_user):
        """By name, with the way; for each door the same."""
        folder, _, _ = kept
        another_user()
        place = r"\['special'\]\['vocabulary'\] \(a Vocabulary\)"
        with pytest.raises(UntrustedPickleError, match=place):
            Keeps.load_from_checkpoint(newest(folder).path)
        module = Keeps()
        with pytest.raises(UntrustedPickleError, match=r"(?s)pass trust_pickle=True"):
            fit(folder, module=module, callbacks=[Remembers()], min_key="val_loss")
        assert module.given == []
        with trusting_pickle():
            assert Keeps.load_from_checkpoint(newest(folder).path).vocabulary.words == ["a", "b"]
        exported = to_lightning(newest(folder), tmp_path / "x.ckpt")
        remarks = " ".join(exported.remarks)
        assert "left out is extras['special']['vocabulary'] (a Vocabulary)" in remarks
        dump = torch.load(exported.path, weights_only=True)
        assert dump["special"] == {"number": 5}

    def test_what_another_user_skips_is_not_needed(self, kept, another_user, tmp_path):
        """`skip` names the files that hold it."""
        folder, _, _ = kept
        another_user()
        run = fit(
            tmp_path,
            module=Steps(),
            ckpt_path=str(newest(folder).path),
            skip=["extras", "callbacks"],
            trainer={"max_epochs": 4},
        )
        assert run.module.steps == 16

    def test_logged_values_within_an_epoch(self, tmp_path):
        """A subclass of a tensor, and the state of a metric."""
        stop = raise_at("on_train_batch_end", 3, RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="stop"):
            fit(tmp_path, module=Logs(), callbacks=[stop], trainer=ONE, **EARLY)
        assert "metrics" in newest(tmp_path).paramfiles
        run = fit(tmp_path, module=Logs(), trainer=ONE, **EARLY)
        assert run.trainer.callback_metrics["labelled"] == 1
        assert run.trainer.callback_metrics["counted"] == 4

    def test_objects_among_the_users_recoverables(self, tmp_path):
        """They have files of their own."""

        class Replay:
            def __init__(self, buffer: object = None) -> None:
                self.buffer = buffer

            def state_dict(self):
                return {"buffer": self.buffer}

            def load_state_dict(self, state):
                self.buffer = state["buffer"]

        fit(tmp_path, trainer=ONE, recoverables={"replay": Replay(Vocabulary(["x"]))})
        replay = Replay()
        fit(tmp_path, recoverables={"replay": replay})
        assert replay.buffer == Vocabulary(["x"])

    def test_a_class_that_is_gone_is_named(self, kept, monkeypatch):
        """It was renamed since, say: what to do is said, and the file is not called damaged."""
        folder, _, _ = kept
        monkeypatch.delattr(f"{__name__}.Vocabulary")
        with pytest.raises(MismatchError, match=r"(?s)Vocabulary.*Import or define"):
            Keeps.load_from_checkpoint(newest(folder).path)

    def test_one_warning_names_all_that_will_need_trust(self, tmp_path, monkeypatch, caplog):
        """Where no secret can be kept; at the first save, and not one for each value."""
        (tmp_path / "config").write_text("")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        run = fit(
            tmp_path / "run",
            module=Keeps(("a",)),
            callbacks=[Remembers()],
            min_key="val_loss",
            trainer={"max_epochs": 2},
        )
        (warning,) = [r.getMessage() for r in caplog.records if "pickle" in r.getMessage()]
        assert "extras['special']['vocabulary'] (a Vocabulary)" in warning
        assert "callbacks[" in warning
        # What this process saved it knows without a secret.
        assert run.module.vocabulary == Vocabulary(["a"])


class RankKeeps(_ranks.Model):
    """A module of several ranks that keeps an object."""

    vocabulary = Vocabulary(["a"])

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = self.vocabulary

    def on_load_checkpoint(self, checkpoint):
        self.vocabulary = checkpoint["vocabulary"]


def fit_on_two_machines(folder: Path, rank: int) -> None:
    """Fit one rank whose home the other one does not see; say what its module has at the end."""
    os.environ["XDG_CONFIG_HOME"] = str(folder / f"machine{rank}")
    trainer, module, _, loaders = _ranks.make(
        folder / "checkpoints", rank, module=RankKeeps, trainer={"max_epochs": 1}
    )
    trainer.fit(module, **loaders)
    (folder / f"words{rank}.txt").write_text(str(module.vocabulary.words))


def test_all_ranks_get_it_back_at_the_end_of_a_fit(tmp_path):
    """On machines that share no secret, too: the best weights are restored by every rank."""
    assert _ranks.run(fit_on_two_machines, tmp_path).codes == [0, 0]
    assert [(tmp_path / f"words{rank}.txt").read_text() for rank in (0, 1)] == ["['a']"] * 2
    assert not (tmp_path / "machine1").exists()


HYPERPARAMETERS = {
    "plain": 1,
    "kind": Kind.TANH,
    "data": Vocabulary(["x"]),
    "namespace": Namespace(a=1),
    "path": Path("a/b"),
    "when": dt.datetime(2026, 11, 22, tzinfo=dt.timezone.utc),
    "every": dt.timedelta(hours=1),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "sizes": (1, 2),
    "names": {"a", "b"},
    "frozen": frozenset([1]),
    "number": np.float32(0.5),
    "function": torch.relu,
    "partial": functools.partial(torch.add, 1),
}


class TestHyperparameters:
    """They come back as from Lightning's own file."""

    def test_each_kind_comes_back_what_it_was(self, tmp_path):
        """As `load_from_checkpoint(file, weights_only=False)` gives them."""
        module = Wide(**HYPERPARAMETERS, layer=torch.nn.Linear(1, 1))
        run = fit(tmp_path / "run", module=module, trainer=ONE)
        run.trainer.save_checkpoint(tmp_path / "own.ckpt")
        own = torch.load(tmp_path / "own.ckpt", weights_only=False)["hyper_parameters"]
        loaded = Wide.load_from_checkpoint(newest(tmp_path / "run").path)
        for key, value in HYPERPARAMETERS.items():
            assert type(loaded.hparams[key]) is type(own[key]) is type(value), key
            if key != "partial":
                assert loaded.hparams[key] == value, key
        assert loaded.hparams["partial"](2) == 3
        assert torch.equal(loaded.hparams["layer"].weight, module.hparams["layer"].weight)
        assert "layer" in (newest(tmp_path / "run").path / "hparams.yaml").read_text()

    def test_another_user_gets_those_that_are_plain(self, tmp_path, another_user):
        """Without the three that are of the user's own classes no trust is needed."""
        plain = {
            key: value
            for key, value in HYPERPARAMETERS.items()
            if key not in ("kind", "data", "function", "partial")
            # Before torch 2.5 a set is nothing that it reads without pickle.
            and (key != "names" or since(version_of("torch"), "2.5"))
        }
        fit(tmp_path, module=Wide(**plain), trainer=ONE)
        another_user()
        loaded = Wide.load_from_checkpoint(newest(tmp_path).path)
        assert dict(loaded.hparams) == plain

    def test_another_user_is_told_which_are_not(self, tmp_path, another_user):
        """No module is made with None for what it was given."""
        fit(tmp_path, module=Wide(kind=Kind.TANH), trainer=ONE)
        another_user()
        with pytest.raises(UntrustedPickleError, match=r"\['kind'\] \(a Kind\)"):
            Wide.load_from_checkpoint(newest(tmp_path).path)

    @pytest.mark.parametrize("whole", [True, False])
    def test_omegaconf(self, tmp_path, whole, another_user):
        """The configuration as all hyperparameters, or as one of them."""
        omegaconf = pytest.importorskip("omegaconf")
        config = omegaconf.OmegaConf.create({"lr": 0.1, "net": {"h": 3, "lr": "${lr}"}})

        class Configured(Steps):
            def __init__(self, cfg):
                super().__init__()
                self.save_hyperparameters(cfg) if whole else self.save_hyperparameters()
                self.cfg = cfg

        fit(tmp_path, module=Configured(config), trainer=ONE)
        another_user()
        loaded = Configured.load_from_checkpoint(newest(tmp_path).path)
        assert type(loaded.cfg) is omegaconf.DictConfig
        assert loaded.cfg == config and loaded.cfg.net.lr == 0.1
        assert loaded.hparams == (config if whole else {"cfg": config})

    def test_what_cannot_be_pickled_is_left_out_and_said(self, tmp_path):
        """By Lightning; the run is not stopped."""
        module = Given(size=3)
        module.hparams["given"] = lambda x: x
        with pytest.warns(UserWarning, match="'given' removed from hparams"):
            fit(tmp_path, module=module, trainer=ONE)
        assert dict(Given.load_from_checkpoint(newest(tmp_path).path).hparams)["size"] == 3


class Given(Steps):
    """A module that is given a function."""

    def __init__(self, given: object = None, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()


NAMES = {"thing": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}}
OWN = "lightning.pytorch.cli.instantiate_module"


class TestNamesInHyperparameters:
    """Classes that `LightningCLI` makes by name: of this user's own runs, and of nobody else's."""

    @pytest.fixture(autouse=True)
    def instantiated(self, monkeypatch):
        from lightning.pytorch import cli

        made = []

        def instantiate_module(cls, arguments):
            made.append(arguments)
            return cls()

        monkeypatch.setattr(cli, "instantiate_module", instantiate_module, raising=False)
        return made

    @pytest.fixture
    def folder(self, tmp_path):
        module = Wide(**NAMES)
        module.hparams["_instantiator"] = OWN
        fit(tmp_path / "run", module=module, trainer=ONE)
        return newest(tmp_path / "run").path

    def test_those_of_ones_own_run_are_made(self, folder, instantiated):
        """The file of the hyperparameters is marked."""
        Wide.load_from_checkpoint(folder)
        assert instantiated == [NAMES]

    def test_those_of_somebody_else_are_refused(self, folder, instantiated, another_user):
        """Unless trusted."""
        another_user()
        with pytest.raises(UntrustedPickleError, match="would be imported and may be called"):
            Wide.load_from_checkpoint(folder)
        assert not instantiated

    @pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
    @pytest.mark.parametrize("part", ["extras", "datamodule", "loops", "callbacks"])
    def test_names_in_another_file_are_not_covered_by_the_mark(
        self, folder, tmp_path, instantiated, key, part
    ):
        """Only what is in the marked file itself is this user's own."""
        hostile = {key: {"_instantiator": OWN, "x": {"class_path": "os.system"}}}
        state = torch.load(folder / "loops.ckpt", weights_only=True) if part == "loops" else {}
        torch.save({**state, **hostile}, folder / f"{part}.ckpt")
        forget_manifest(folder)
        with contextlib.suppress(UntrustedPickleError):
            Wide.load_from_checkpoint(folder)
        assert "os.system" not in str(instantiated)

    def test_those_of_an_imported_file_are_not_marked(self, tmp_path, instantiated):
        """Whoever turns a foreign file into a folder has not written what is in it."""
        nowhere = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
        dump = {**nowhere, "state_dict": Wide().state_dict()}
        dump["hyper_parameters"] = {"_instantiator": OWN, **NAMES}
        torch.save(dump, tmp_path / "foreign.ckpt")
        folder = from_lightning(tmp_path / "foreign.ckpt", tmp_path / "run").path
        with pytest.raises(UntrustedPickleError, match="would be imported"):
            Wide.load_from_checkpoint(folder)
        assert not instantiated
