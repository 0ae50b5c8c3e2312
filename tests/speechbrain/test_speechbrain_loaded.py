"""Where SpeechBrain is loaded, its classes are saved and loaded as it does it, and it knows ours."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _python import python

import lightning_sbckpt as ours
from lightning_sbckpt import Checkpointer
from lightning_sbckpt.errors import HookError
from lightning_sbckpt.hooks import HookRegistry, speechbrain


@pytest.fixture(autouse=True)
def sb(loaded_speechbrain):
    """SpeechBrain, loaded."""
    return loaded_speechbrain


@pytest.fixture
def theirs(sb):
    """SpeechBrain's module of checkpoints."""
    return sb.utils.checkpoints


def cross(tmp_path, save, load, trained, fresh):
    """Save one object by one checkpointer and load it into another object by another."""
    with_ours = save.Checkpointer(tmp_path, {"it": trained})
    with_ours.save_checkpoint()
    if save is ours:
        with_ours.release()
    load.Checkpointer(tmp_path, {"it": fresh}).recover_if_possible()
    return fresh


SCHEDULERS = {
    "WarmAndExpDecayLRSchedule": {
        "lr": 1.0,
        "n_warmup_steps": 2,
        "decay_factor": 0.9,
        "total_steps": 10,
    },
    "NewBobScheduler": {"initial_value": 1.0},
    "LinearWarmupScheduler": {
        "initial_value": 1.0,
        "num_warmup_steps": 2,
        "num_training_steps": 9,
    },
    "NoamScheduler": {"lr_initial": 1.0, "n_warmup_steps": 2},
    "NoamIntervalScheduler": {
        "lr_initial": 1.0,
        "n_warmup_steps": 2,
        "anneal_steps": [3],
        "anneal_rates": [0.5],
    },
    "LinearNoamScheduler": {"lr_initial": 1.0, "n_warmup_steps": 2, "n_keep_steps": 3},
    "CyclicCosineScheduler": {"n_warmup_steps": 2, "lr_initial": 1.0, "total_steps": 10},
    "ReduceLROnPlateau": {},
    "CyclicLRScheduler": {},
    "IntervalScheduler": {"intervals": [{"steps": 2, "lr": 0.5}, {"steps": 4, "lr": 0.25}]},
    "InverseSquareRootScheduler": {"warmup_steps": 2},
    "WarmCoolDecayLRSchedule": {"lr": 1.0, "warmup": 2, "cooldown": 2, "total_steps": 10},
    "TriStageLRSchedule": {
        "lr": 1.0,
        "warmup_steps": 2,
        "hold_steps": 2,
        "decay_steps": 2,
        "total_steps": 10,
    },
}


def numbers_of(obj):
    """The numbers that an object has as attributes."""
    found = {name: value for name, value in vars(obj).items() if type(value) in (int, float)}
    return {name: value for name, value in found.items() if abs(value) < 1e9}


def test_all_schedulers_with_hooks_are_tried(sb, theirs):
    """None is forgotten when SpeechBrain gets another."""
    schedulers = sb.nnet.schedulers
    registered = {
        cls.__name__ for cls in theirs.DEFAULT_SAVE_HOOKS if cls.__module__ == schedulers.__name__
    }
    assert registered == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_whoever_saved_it(sb, theirs, tmp_path, name):
    """What comes back is what SpeechBrain itself brings back; one it can save and not load."""
    cls = getattr(sb.nnet.schedulers, name)
    trained = cls(**SCHEDULERS[name])
    for attribute, value in numbers_of(trained).items():
        setattr(trained, attribute, value + 7)
    fresh = numbers_of(cls(**SCHEDULERS[name]))
    if name == "InverseSquareRootScheduler":
        expected = {**fresh, "n_steps": trained.n_steps}
    else:
        expected = numbers_of(
            cross(tmp_path / "theirs", theirs, theirs, trained, cls(**SCHEDULERS[name]))
        )
        loaded = cross(tmp_path / "b", ours, theirs, trained, cls(**SCHEDULERS[name]))
        assert numbers_of(loaded) == expected
    assert expected != fresh
    for number, save in enumerate((ours, theirs)):
        loaded = cross(tmp_path / str(number), save, ours, trained, cls(**SCHEDULERS[name]))
        assert numbers_of(loaded) == expected


def test_the_statistics_of_a_normalisation_cross_over(sb, theirs, tmp_path):
    """`InputNormalization` is a module without parameters, saved by a hook of its own."""
    make = sb.processing.features.InputNormalization
    trained = make()
    trained(torch.randn(4, 7, 3) * 5 + 2, torch.ones(4))
    for number, (save, load) in enumerate(((ours, ours), (theirs, ours), (ours, theirs))):
        fresh = cross(tmp_path / str(number), save, load, trained, make())
        assert fresh.count == 28
        assert torch.equal(fresh.glob_mean, trained.glob_mean)


@pytest.mark.parametrize("kind", ["CategoricalEncoder", "TextEncoder", "CTCTextEncoder"])
def test_an_encoder_keeps_its_labels(sb, theirs, tmp_path, kind):
    """Subclasses inherit the hook."""
    make = getattr(importlib.import_module("speechbrain.dataio.encoder"), kind)
    trained = make()
    trained.update_from_iterable("cab")
    for number, (save, load) in enumerate(((ours, ours), (theirs, ours), (ours, theirs))):
        fresh = cross(tmp_path / str(number), save, load, trained, make())
        assert fresh.lab2ind == trained.lab2ind


def test_loaders_go_on_with_the_next_batch(sb, theirs, tmp_path):
    """`SaveableDataLoader` and `LoopedLoader`, within an epoch."""
    loaders = importlib.import_module("speechbrain.dataio.dataloader")
    for number, (save, load) in enumerate(((ours, ours), (theirs, ours), (ours, theirs))):
        trained, fresh = (loaders.SaveableDataLoader(range(8), batch_size=2) for _ in range(2))
        batches = iter(trained)
        next(batches)
        folder = tmp_path / str(number)
        with_it = save.Checkpointer(folder, {"dataloader": trained})
        with_it.save_checkpoint(end_of_epoch=False)
        if save is ours:
            with_it.release()
        load.Checkpointer(folder, {"dataloader": fresh}).recover_if_possible()
        assert [batch.tolist() for batch in fresh] == [[2, 3], [4, 5], [6, 7]]
    looped, again = (loaders.LoopedLoader([1, 2, 3], 2) for _ in range(2))
    assert list(looped) == [1, 2]
    cross(tmp_path / "looped", ours, ours, looped, again)
    assert again.step == looped.step


def test_an_adapted_model_saves_what_is_trained(sb, theirs, tmp_path):
    """`AdaptedModel` has a save hook that leaves the frozen weights out, and so has the file."""
    adapters = sb.nnet.adapters

    def make():
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(2, 2))
        return adapters.AdaptedModel(base, adapters.LoRA, ["*"], adapter_kwargs={"rank": 1})

    trained = make()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.fill_(3)
    fresh = cross(tmp_path, ours, theirs, trained, make())
    assert all((p == 3).all() for p in fresh.parameters() if p.requires_grad)
    (saved,) = Checkpointer(tmp_path, access="read").list_checkpoints()
    assert len(torch.load(saved.paramfiles["it"], weights_only=True)) < len(trained.state_dict())


def test_generators_and_aligners_too(sb, tmp_path):
    """`SaveableGenerator` and `HMMAligner`: more classes with hooks of their own."""
    generator, other = (
        sb.utils.repro.SaveableGenerator({"default": torch.default_generator}) for _ in range(2)
    )
    torch.manual_seed(3)
    saved = Checkpointer(tmp_path, {"it": generator}).save_checkpoint()
    expected = torch.rand(1)
    Checkpointer(tmp_path, {"it": other}).load_checkpoint(saved)
    assert torch.equal(torch.rand(1), expected)
    aligner = importlib.import_module("speechbrain.alignment.aligner").HMMAligner
    trained = aligner()
    trained.align_dict["a"] = torch.tensor([1, 2])
    fresh = cross(tmp_path / "aligner", ours, ours, trained, aligner())
    assert torch.equal(fresh.align_dict["a"], trained.align_dict["a"])


class TestMarks:
    """Marks and registries of either side serve the checkpointer of either side."""

    @pytest.mark.parametrize("marks", ["ours", "theirs"])
    @pytest.mark.parametrize("decorator", ["ours", "theirs"])
    def test_every_mixture_is_saved_by_both(self, theirs, tmp_path, marks, decorator):
        """The marks of one, the class decorator of one, the checkpointer of one."""
        mark = {"ours": ours, "theirs": theirs}[marks]

        class Counted:
            count = 0

            @mark.mark_as_saver
            def save(self, path):
                Path(path).write_text(str(self.count))

            @mark.mark_as_loader
            def load(self, path, end_of_epoch):
                self.count = int(Path(path).read_text())

        {"ours": ours, "theirs": theirs}[decorator].register_checkpoint_hooks(Counted)
        trained = Counted()
        trained.count = 3
        for number, (save, load) in enumerate(((ours, theirs), (theirs, ours))):
            fresh = cross(tmp_path / str(number), save, load, trained, Counted())
            assert fresh.count == 3

    def test_our_own_counters_are_saved_by_their_checkpointer(self, theirs, tmp_path):
        """Whichever of the two was imported first."""
        trained = ours.EpochCounter(5)
        assert next(trained) == 1
        assert cross(tmp_path, theirs, theirs, trained, ours.EpochCounter(5)).current == 1

    def test_what_was_registered_before_speechbrain_came_is_told(self, tmp_path):
        """The next object or lookup tells it."""
        script = f"""
import importlib.machinery, sys, types
from pathlib import Path
import lightning_sbckpt as ours

@ours.register_checkpoint_hooks
class Early:
    @ours.mark_as_saver
    def save(self, path): Path(path).write_text("early")
    @ours.mark_as_loader
    def load(self, path, end_of_epoch): self.text = Path(path).read_text()

standin = types.ModuleType("torchaudio")
standin.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = standin
import speechbrain.utils.checkpoints as theirs
counter = ours.EpochCounter(2)
checkpointer = theirs.Checkpointer({str(tmp_path)!r}, {{"early": Early(), "counter": counter}})
print(checkpointer.save_checkpoint().paramfiles["early"].read_text())
"""
        done = python("-c", script)
        assert done.stdout.split() == ["early"], done.stderr

    def test_the_first_class_along_the_mro_decides(self, theirs, tmp_path):
        """A subclass registered on one side wins over its base on the other, in both directions."""

        def make(api, text, base=object):
            class Made(base):
                @api.mark_as_saver
                def save(self, path):
                    Path(path).write_text(text)

            return api.register_checkpoint_hooks(Made)

        ours_on_theirs = make(ours, "sub", make(theirs, "base"))
        theirs_on_ours = make(theirs, "sub", make(ours, "base"))
        plain = type("Plain", (make(theirs, "base"),), {})
        objects = {"a": ours_on_theirs(), "b": theirs_on_ours(), "c": plain()}
        for folder, api in ((tmp_path / "ours", ours), (tmp_path / "theirs", theirs)):
            saved = api.Checkpointer(folder, objects).save_checkpoint()
            texts = {name: path.read_text() for name, path in saved.paramfiles.items()}
            assert texts == {"a": "sub", "b": "sub", "c": "base"}

    def test_a_hook_that_a_user_gave_to_torchs_own_class_counts(
        self, theirs, tmp_path, monkeypatch
    ):
        """In SpeechBrain's dictionary, against the hook that needs no registration here."""
        hook = lambda obj, path: Path(path).write_text("mine")  # noqa: E731
        monkeypatch.setitem(theirs.DEFAULT_SAVE_HOOKS, torch.nn.Linear, hook)
        monkeypatch.setitem(theirs.DEFAULT_SAVE_HOOKS, torch.nn.Module, hook)
        objects = {"a": torch.nn.Linear(1, 1), "b": torch.nn.Conv1d(1, 1, 1)}
        saved = Checkpointer(tmp_path, objects).save_checkpoint()
        assert {path.read_text() for path in saved.paramfiles.values()} == {"mine"}

    def test_get_default_hook_asks_too(self, sb):
        """The function, with the dictionaries here, and a copy of the registry; an empty one doesn't."""
        norm = sb.processing.features.InputNormalization()
        found = ours.get_default_hook(norm, ours.DEFAULT_SAVE_HOOKS)
        assert found is not None
        assert found.__name__ == "_save"
        assert ours.hooks.default_registry.copy().saver(norm).__name__ == "_save"
        assert HookRegistry().saver(norm) is None

    def test_their_table_is_found_when_names_are_replaced(self, sb, theirs, tmp_path, monkeypatch):
        """A program may put our dictionaries in the place of SpeechBrain's."""
        assert speechbrain.tables("save")
        for name in ("DEFAULT_SAVE_HOOKS", "DEFAULT_LOAD_HOOKS", "DEFAULT_TRANSFER_HOOKS"):
            monkeypatch.setattr(theirs, name, getattr(ours, name))
        norm = sb.processing.features.InputNormalization()
        assert ours.hooks.default_registry.saver(norm).__name__ == "_save"


class TestMarkedWithoutDecorator:
    """A marked method that nobody registered is no hook, as there; and nothing is lost here."""

    def test_the_stopper_of_speechbrain_goes_on(self, theirs, tmp_path):
        """Its class marks methods and is not decorated: there the best score is lost."""
        make = importlib.import_module("speechbrain.utils.epoch_loop").EpochCounterWithStopper
        trained = make(9, 2, 0, "min")
        for _, loss in zip(trained, (0.5, 0.75), strict=False):
            trained.update_metric(loss)
            if loss == 0.75:
                break
        fresh = cross(tmp_path / "a", ours, ours, trained, make(9, 2, 0, "min"))
        assert (fresh.current, fresh.best_limit, fresh.best_score) == (2, 1, 0.5)
        # The file itself is the one that SpeechBrain writes and reads.
        assert cross(tmp_path / "b", ours, theirs, trained, make(9, 2, 0, "min")).current == 2
        assert cross(tmp_path / "c", theirs, ours, trained, make(9, 2, 0, "min")).current == 2
        (saved,) = Checkpointer(tmp_path / "a", access="read").list_checkpoints()
        assert list(saved.paramfiles) == ["it"]

    def test_a_scheduled_loss_goes_on(self, sb, theirs, tmp_path):
        """A module of SpeechBrain's with marks and no decorator."""
        mse = torch.nn.MSELoss

        def make():
            schedule = [{"loss_fn": mse(), "steps": 2}, {"loss_fn": mse(), "steps": 3}]
            return sb.nnet.schedulers.ScheduledLoss(schedule)

        trained = make()
        for _ in range(3):
            trained(torch.ones(1), torch.ones(1))
        fresh = cross(tmp_path / "a", ours, ours, trained, make())
        assert (fresh.n_steps, fresh.next_switch) == (3, 5)
        cross(tmp_path / "b", theirs, ours, trained, make())
        cross(tmp_path / "c", ours, theirs, trained, make())


class TestLostState:
    """What no `state_dict` holds is an error, and nothing is saved."""

    def test_a_module_with_tensors_in_plain_attributes_is_refused(self, tmp_path):
        """By name, with what to do."""

        class Norm(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mean = torch.ones(2)
                self.history = [torch.ones(1)]

        with pytest.raises(HookError, match=r"'norm' \(Norm\) keeps mean, history outside"):
            Checkpointer(tmp_path, {"norm": Norm()}).save_checkpoint()
        with pytest.raises(HookError, match=r"'all.0' \(Norm\)"):
            Checkpointer(tmp_path, {"all": torch.nn.Sequential(Norm())}).save_checkpoint()
        assert Checkpointer(tmp_path).list_checkpoints() == []
        # With parameters beside them they may be constants, and SpeechBrain would save it.
        mixed = torch.nn.Sequential(Norm(), torch.nn.Linear(1, 1))
        Checkpointer(tmp_path, {"mixed": mixed}).save_checkpoint()
        saved = Checkpointer(tmp_path, {"norm": Norm()})
        saved.add_recoverable("norm", Norm(), custom_save_hook=lambda obj, path: path.touch())
        saved.save_checkpoint()

    def test_a_part_with_hooks_of_its_own_has_to_be_a_recoverable(self, sb, tmp_path):
        """A normalisation inside of a model, where the hook of the whole is that of modules."""
        norm = sb.processing.features.InputNormalization()
        model = torch.nn.Sequential(norm, torch.nn.Linear(3, 1))
        checkpointer = Checkpointer(tmp_path, {"model": model})
        checkpointer.save_checkpoint()  # It has seen nothing yet.
        norm(torch.randn(4, 7, 3), torch.ones(4))
        with pytest.raises(HookError, match=r"'model.0' \(InputNormalization\) keeps glob_mean"):
            checkpointer.save_checkpoint()
        checkpointer.add_recoverable("norm", norm)
        checkpointer.save_checkpoint()

    def test_what_has_nothing_to_lose_is_saved(self, tmp_path, caplog):
        """Modules without tensors, with buffers that are not persistent, with metrics in them."""
        torchmetrics = pytest.importorskip("torchmetrics")
        hidden = torch.nn.Module()
        hidden.register_buffer("window", torch.ones(3), persistent=False)
        metrics = torch.nn.ModuleDict({"mean": torchmetrics.MeanMetric()})
        objects = {"relu": torch.nn.ReLU(), "hidden": hidden, "metrics": metrics}
        Checkpointer(tmp_path, objects).save_checkpoint()
        assert "empty" in caplog.text


class TestLostNumbers:
    """Numbers in plain attributes of a module, which no `state_dict` holds, may be state or constants."""

    class Curriculum(torch.nn.Module):
        """It counts, and has no parameter."""

        def __init__(self):
            super().__init__()
            self.steps, self.limit, self.rate, self.nothing = 0, 10, 0.5, float("nan")

    @pytest.mark.parametrize("add", ["at once", "later", "into the dictionary"])
    def test_a_module_that_has_counted_is_refused(self, tmp_path, add):
        """Its file would hold nothing; what has not changed is taken for a constant."""
        module = self.Curriculum()
        checkpointer = Checkpointer(tmp_path, {"course": module} if add == "at once" else {})
        if add == "later":
            checkpointer.add_recoverable("course", module)
        elif add == "into the dictionary":
            checkpointer.recoverables["course"] = module
        checkpointer.save_checkpoint()  # It has not counted yet.
        module.steps += 1
        for _ in range(2):
            with pytest.raises(HookError, match=r"'course' \(Curriculum\) keeps steps outside"):
                checkpointer.save_checkpoint()

    def test_a_class_that_says_what_its_state_is_is_saved(self, tmp_path):
        """By `get_extra_state`, which torch asks."""

        class Told(self.Curriculum):
            def get_extra_state(self):
                return self.steps

            def set_extra_state(self, state):
                self.steps = state

        module, fresh = Told(), Told()
        checkpointer = Checkpointer(tmp_path, {"course": module})
        module.steps = 4
        saved = checkpointer.save_checkpoint()
        Checkpointer(tmp_path, {"course": fresh}, access="read").load_checkpoint(saved)
        assert fresh.steps == 4

    def test_it_is_refused_within_another(self, sb, tmp_path):
        """Also where the part has hooks that the whole doesn't call."""
        whole = torch.nn.Sequential(self.Curriculum(), torch.nn.ReLU())
        checkpointer = Checkpointer(tmp_path / "a", {"whole": whole})
        whole[0].steps = 3
        with pytest.raises(HookError, match=r"'whole.0' \(Curriculum\) keeps steps"):
            checkpointer.save_checkpoint()

        @ours.register_checkpoint_hooks
        class Hooked(self.Curriculum):
            @ours.mark_as_saver
            def save(self, path):
                Path(path).write_text(str(self.steps))

        model = torch.nn.Sequential(Hooked(), torch.nn.Linear(1, 1))
        checkpointer = Checkpointer(tmp_path / "b", {"model": model})
        model[0].steps = 3
        with pytest.raises(HookError, match=r"'model.0' \(Hooked\) keeps steps"):
            checkpointer.save_checkpoint()
        checkpointer.add_recoverable("part", model[0])
        checkpointer.save_checkpoint()

    def test_beside_weights_it_is_told_once(self, sb, tmp_path, caplog):
        """SpeechBrain saves `GlobalNorm` so, without its count; a cache would be no loss."""
        norm = sb.processing.features.GlobalNorm(update_steps=3)
        checkpointer = Checkpointer(tmp_path, {"norm": norm})
        checkpointer.save_checkpoint()
        assert not caplog.messages
        for _ in range(2):
            norm(torch.randn(2, 5, 3), torch.ones(2))
            checkpointer.save_checkpoint()
        told = [message for message in caplog.messages if "step_count" in message]
        assert len(told) == 1
        assert (
            "GlobalNorm.step_count (0 when it was added, 1 now) is not in its state_dict" in told[0]
        )


class TestOldNames:
    """Parameters that SpeechBrain has renamed are found under their new names."""

    @staticmethod
    def model(name):
        """A module with a layer of that name."""
        outer = torch.nn.Module()
        outer.layer = torch.nn.Module()
        outer.layer.add_module(name, torch.nn.Linear(1, 1))
        return outer

    def test_they_are_mapped_by_all_that_load(self, tmp_path, caplog):
        """Recovery, transfer and averages."""
        old, new = self.model("mutihead_attn"), self.model("multihead_attn")
        checkpointer = Checkpointer(tmp_path, {"model": old})
        saved = checkpointer.save_checkpoint()
        Checkpointer(tmp_path, {"model": new}, access="read").load_checkpoint(saved)
        expected = old.layer.mutihead_attn.weight
        assert torch.equal(new.layer.multihead_attn.weight, expected)
        other = self.model("multihead_attn")
        ours.torch_parameter_transfer(other, saved.paramfiles["model"])
        assert torch.equal(other.layer.multihead_attn.weight, expected)
        averaged = ours.average_checkpoints([saved], "model")
        assert sorted(averaged) == ["layer.multihead_attn.bias", "layer.multihead_attn.weight"]
        assert "no use" not in caplog.text

    def test_a_model_that_has_the_old_name_keeps_it(self, tmp_path):
        """SpeechBrain would not load it."""
        old, again = self.model("mutihead_attn"), self.model("mutihead_attn")
        saved = Checkpointer(tmp_path, {"model": old}).save_checkpoint()
        Checkpointer(tmp_path, {"model": again}, access="read").load_checkpoint(saved)
        assert torch.equal(again.layer.mutihead_attn.weight, old.layer.mutihead_attn.weight)

    def test_a_users_own_mapping_counts(self, theirs, tmp_path, monkeypatch):
        """The dictionary may be added to."""
        monkeypatch.setitem(theirs.KEYS_MAPPING, ".before", ".after")
        old, new = self.model("before"), self.model("after")
        saved = Checkpointer(tmp_path, {"model": old}).save_checkpoint()
        Checkpointer(tmp_path, {"model": new}, access="read").load_checkpoint(saved)
        assert torch.equal(new.layer.after.weight, old.layer.before.weight)


class TestPretrainer:
    """`Pretrainer` takes SpeechBrain's arguments and loads SpeechBrain's objects."""

    @pytest.fixture
    def source(self, sb, tmp_path):
        """A folder with the file of a normalisation."""
        norm = sb.processing.features.InputNormalization()
        norm(torch.randn(4, 5, 2), torch.ones(4))
        (tmp_path / "source").mkdir()
        norm._save(tmp_path / "source" / "norm.ckpt")
        return tmp_path / "source"

    @pytest.mark.parametrize("strategy", ["SYMLINK", "COPY", "COPY_SKIP_CACHE", "NO_LINK", None])
    def test_every_strategy_loads(self, sb, source, tmp_path, strategy):
        """A copy has bytes of its own, no strategy makes a symbolic link, and one leaves all in place."""
        fetching = sb.utils.fetching
        norm = sb.processing.features.InputNormalization()
        options = {"fetch_config": fetching.FetchConfig()}
        if strategy is not None:
            options["local_strategy"] = fetching.LocalStrategy[strategy]
        pretrainer = ours.Pretrainer(tmp_path / "in", {"norm": norm})
        collected = pretrainer.collect_files(str(source), **options)["norm"]
        pretrainer.load_collected()
        assert norm.count == 20
        assert not collected.is_symlink()
        assert (collected.parent == source) == (strategy == "NO_LINK")
        linked = collected.stat().st_ino == (source / "norm.ckpt").stat().st_ino
        assert linked == (strategy in ("SYMLINK", "NO_LINK", None))

    def test_a_named_source_of_this_machine_is_a_folder(self, sb, source, tmp_path):
        """`FetchSource` as the default and in a path."""
        fetching = sb.utils.fetching
        local = lambda path: fetching.FetchSource(fetching.FetchFrom.LOCAL, str(path))  # noqa: E731
        for options in ({"paths": {"norm": local(source / "norm.ckpt")}}, {}):
            norm = sb.processing.features.InputNormalization()
            pretrainer = ours.Pretrainer(None, {"norm": norm}, **options)
            pretrainer.collect_files(local(source))
            pretrainer.load_collected()
            assert norm.count == 20

    @pytest.mark.parametrize("where", ["some/repository", "https://host/models", "FetchSource"])
    def test_what_is_elsewhere_is_fetched_by_speechbrain(
        self, sb, source, tmp_path, monkeypatch, where
    ):
        """With what it was called with; as a copy unless something else is asked for."""
        fetching = sb.utils.fetching
        seen = {}

        def fetch(filename, source, savedir, save_filename, local_strategy, fetch_config=None):
            seen.update(locals())
            savedir.mkdir(exist_ok=True)
            (savedir / save_filename).write_bytes(file.read_bytes())
            return savedir / save_filename

        file = source / "norm.ckpt"
        monkeypatch.setattr(fetching, "fetch", fetch)
        if where == "FetchSource":
            where = fetching.FetchSource(fetching.FetchFrom.HUGGING_FACE, "some/repository")
        norm = sb.processing.features.InputNormalization()
        config = fetching.FetchConfig(revision="main")
        pretrainer = ours.Pretrainer(tmp_path / "in", {"norm": norm})
        pretrainer.collect_files(where, fetch_config=config)
        pretrainer.load_collected()
        assert norm.count == 20
        assert (seen["source"], seen["filename"]) == (where, "norm.ckpt")
        assert (seen["local_strategy"].name, seen["fetch_config"]) == ("COPY", config)

    def test_a_fetch_that_fails_is_told_by_name(self, sb, tmp_path, monkeypatch):
        """With SpeechBrain's own error."""

        def fetch(**_):
            raise ValueError("File not found on HF hub")

        monkeypatch.setattr(sb.utils.fetching, "fetch", fetch)
        pretrainer = ours.Pretrainer(tmp_path, {"model": torch.nn.Linear(1, 1)})
        with pytest.raises(FileNotFoundError, match=r"'model'.*not found on HF hub"):
            pretrainer.collect_files("some/repository")


def test_a_hook_that_waits_for_all_ranks_is_run_where_they_do_not(theirs):
    """SpeechBrain's wrapper would broadcast, which a rank that failed never joins."""
    ran = []

    @theirs.main_process_only
    def save(obj, path):
        distributed = sys.modules["speechbrain.utils.distributed"]
        ran.append((path, distributed.MAIN_PROC_ONLY))

    alone = speechbrain.on_main_alone(save)
    assert alone is not None
    alone(object(), "path")
    assert ran == [("path", 1)]
    assert speechbrain.on_main_alone(lambda obj, path: None) is None


def test_speechbrain_is_not_imported_by_us():
    """Neither by the import nor by a lookup."""
    script = (
        "import sys, torch, lightning_sbckpt as o;"
        "o.hooks.default_registry.saver(torch.nn.Linear(1, 1)); o.EpochCounter(1);"
        "print([name for name in sys.modules if name.startswith('speechbrain')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
