"""What SpeechBrain documents about its `Checkpointer`: saving, listing, finding, recovery.

Sources: the docstrings and unit tests of `speechbrain.utils.checkpoints`.

`pytest --original` with this file runs every test against the real SpeechBrain.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from _numbered import Plain, make_counter_class, read_number, save_losses, write_number


class TestConstruction:
    """`Checkpointer(checkpoints_dir, recoverables, custom hooks, allow_partial_load)`."""

    @pytest.mark.parametrize("kind", [str, Path])
    def test_the_folder_is_made_with_its_parents(self, api, tmp_path, kind, scale):
        """The folder may be a str or a Path, and need not exist."""
        checkpointer = api.Checkpointer(kind(tmp_path / "a" / "b"), {"model": scale(1.0)})
        assert (tmp_path / "a" / "b").is_dir()
        assert Path(checkpointer.checkpoints_dir) == tmp_path / "a" / "b"
        assert checkpointer.list_checkpoints() == []

    def test_recoverables_are_held_by_name(self, api, tmp_path, scale):
        """`recoverables` maps each name to the very object."""
        model, other = scale(), scale()
        checkpointer = api.Checkpointer(tmp_path, {"model": model})
        checkpointer.add_recoverable("other", other)
        assert checkpointer.recoverables["model"] is model
        assert checkpointer.recoverables["other"] is other

    def test_recoverables_may_be_set_directly(self, api, tmp_path):
        """An object put straight into `checkpointer.recoverables` is saved and loaded."""
        counter = make_counter_class(api)(3)
        checkpointer = api.Checkpointer(tmp_path)
        checkpointer.recoverables["counter"] = counter
        checkpointer.save_checkpoint()
        counter.number = 9
        checkpointer.recover_if_possible()
        assert counter.number == 3

    def test_add_recoverables_adds_and_replaces(self, api, tmp_path, scale):
        """A mapping updates what is there."""
        first, second, third = scale(), scale(), scale()
        checkpointer = api.Checkpointer(tmp_path, {"a": first, "b": second})
        checkpointer.add_recoverables({"b": third, "c": second})
        assert checkpointer.recoverables == {"a": first, "b": third, "c": second}

    @pytest.mark.parametrize("wrong", [["model"], "model", 3])
    def test_add_recoverables_refuses_what_is_no_mapping(self, api, tmp_path, wrong):
        """The error is an AttributeError that shows what was given."""
        checkpointer = api.Checkpointer(tmp_path)
        with pytest.raises(AttributeError, match=re.escape(repr(wrong))):
            checkpointer.add_recoverables(wrong)
        with pytest.raises(AttributeError, match="mapping"):
            api.Checkpointer(tmp_path, wrong)


class TestSaveCheckpoint:
    """`save_checkpoint(meta, end_of_epoch, name, verbosity)`."""

    def test_a_checkpoint_is_a_folder_with_a_file_per_recoverable(self, api, tmp_path, scale):
        """Each recoverable gets `<name>.ckpt`; the meta lies in `CKPT.yaml`."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale(), "other": scale()})
        ckpt = checkpointer.save_checkpoint()
        assert ckpt.path.parent == tmp_path
        assert re.fullmatch(r"CKPT\+\d{4}-\d\d-\d\d\+\d\d-\d\d-\d\d\+\d\d", ckpt.path.name)
        assert {"CKPT.yaml", "model.ckpt", "other.ckpt"} <= set(os.listdir(ckpt.path))
        assert ckpt.paramfiles == {
            "model": ckpt.path / "model.ckpt",
            "other": ckpt.path / "other.ckpt",
        }

    def test_the_saved_checkpoint_is_the_listed_one(self, api, tmp_path, scale):
        """What `save_checkpoint` returns equals what `list_checkpoints` finds."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpt = checkpointer.save_checkpoint(meta={"loss": 0.5, "kind": "fast"})
        assert checkpointer.list_checkpoints() == [ckpt]
        assert api.Checkpointer(tmp_path).list_checkpoints() == [ckpt]

    def test_a_checkpoint_is_a_named_tuple_that_goes_into_sets(self, api, tmp_path, scale):
        """It unpacks as path, meta, paramfiles and hashes although it holds dictionaries."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpt = checkpointer.save_checkpoint()
        path, meta, paramfiles = ckpt
        assert (path, meta, paramfiles) == (ckpt.path, ckpt.meta, ckpt.paramfiles)
        assert isinstance(ckpt, api.Checkpoint)
        assert {ckpt, checkpointer.list_checkpoints()[0]} == {ckpt}
        assert isinstance(ckpt.path, Path)

    def test_meta_holds_time_and_end_of_epoch_by_default(self, api, tmp_path, scale):
        """Without any meta given, `unixtime` and `end-of-epoch` are there."""
        before = time.time()
        ckpt = api.Checkpointer(tmp_path, {"model": scale()}).save_checkpoint()
        assert set(ckpt.meta) == {"unixtime", "end-of-epoch"}
        assert before <= ckpt.meta["unixtime"] <= time.time()
        assert ckpt.meta["end-of-epoch"] is True
        assert yaml.safe_load((ckpt.path / "CKPT.yaml").read_text()) == ckpt.meta

    def test_meta_takes_what_the_user_adds(self, api, tmp_path, scale):
        """Given keys stand beside the default ones, in the result and in the file."""
        meta = {"loss": 15.5, "validation-type": "fast", "num-examples": 3, "list": [1, 2]}
        ckpt = api.Checkpointer(tmp_path, {"model": scale()}).save_checkpoint(meta=meta)
        assert {key: ckpt.meta[key] for key in meta} == meta
        assert yaml.safe_load((ckpt.path / "CKPT.yaml").read_text()) == ckpt.meta
        assert "unixtime" not in meta

    def test_end_of_epoch_reaches_meta_and_load_hooks(self, api, tmp_path):
        """A checkpoint inside an epoch says so, and the loader is told."""
        counter = make_counter_class(api)(4)
        checkpointer = api.Checkpointer(tmp_path, {"counter": counter})
        inside = checkpointer.save_checkpoint(end_of_epoch=False)
        assert inside.meta["end-of-epoch"] is False
        checkpointer.recover_if_possible()
        assert counter.end_of_epoch is False
        checkpointer.save_checkpoint()
        checkpointer.recover_if_possible()
        assert counter.end_of_epoch is True

    def test_a_name_replaces_the_time_stamp(self, api, tmp_path, scale):
        """`name="ep1"` makes the folder `CKPT+ep1`."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpt = checkpointer.save_checkpoint(name="ep1", meta={"loss": 2.0})
        assert ckpt.path == tmp_path / "CKPT+ep1"
        assert checkpointer.find_checkpoint() == ckpt

    def test_a_name_used_again_holds_the_newer_state(self, api, tmp_path, scale):
        """Saving under a name that exists is allowed; one checkpoint remains, the newer."""
        model = scale(1)
        checkpointer = api.Checkpointer(tmp_path, {"model": model})
        checkpointer.save_checkpoint(name="last", meta={"loss": 1.0})
        model.value = 2
        again = checkpointer.save_checkpoint(name="last", meta={"loss": 0.5})
        assert checkpointer.list_checkpoints() == [again]
        model.value = 3
        assert checkpointer.recover_if_possible().meta["loss"] == 0.5
        assert model.value == 2

    def test_saves_of_one_second_get_their_own_folders(self, api, tmp_path, scale):
        """The two digits at the end of the name tell them apart."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpts = [checkpointer.save_checkpoint() for _ in range(4)]
        assert len({ckpt.path for ckpt in ckpts}) == 4
        assert checkpointer.find_checkpoints() == ckpts[::-1]

    @pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
    def test_verbosity_is_the_level_of_the_log_line(
        self, api, tmp_path, scale, caplog, level, all_levels
    ):
        """The line that tells where the checkpoint went is logged at that level."""
        all_levels()
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpt = checkpointer.save_checkpoint(verbosity=level)
        levels = [rec.levelno for rec in caplog.records if str(ckpt.path) in rec.getMessage()]
        assert level in levels

    def test_parameters_may_be_positional(self, api, tmp_path, scale):
        """The order is meta, end_of_epoch, name."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpt = checkpointer.save_checkpoint({"loss": 1.0}, False, "mid")
        assert (ckpt.path.name, ckpt.meta["loss"], ckpt.meta["end-of-epoch"]) == (
            "CKPT+mid",
            1.0,
            False,
        )

    def test_an_object_without_a_hook_is_refused(self, api, tmp_path):
        """The RuntimeError names the type that nothing knows how to save."""
        checkpointer = api.Checkpointer(tmp_path, {"plain": Plain()})
        with pytest.raises(RuntimeError, match="Plain"):
            checkpointer.save_checkpoint()

    def test_an_empty_state_dict_is_warned_of(self, api, tmp_path, caplog):
        """A module without state is saved, with a warning that names the file."""
        module = torch.nn.ReLU()
        checkpointer = api.Checkpointer(tmp_path, {"relu": module})
        ckpt = checkpointer.save_checkpoint()
        assert ckpt.paramfiles["relu"].exists()
        warnings = [rec.getMessage() for rec in caplog.records if rec.levelno == logging.WARNING]
        assert any("empty" in message and "relu" in message for message in warnings)


class TestCustomHooks:
    """Hooks by the name of the recoverable come before those by class."""

    def test_constructor_mappings_are_used_by_name(self, api, tmp_path):
        """The save hook gets (obj, path), the load hook (obj, path, end_of_epoch)."""
        calls = []

        def saver(obj, path):
            calls.append(("save", obj, Path(path).name))
            write_number(obj, path)

        def loader(obj, path, end_of_epoch):
            calls.append(("load", obj, Path(path).name, end_of_epoch))
            read_number(obj, path, end_of_epoch)

        plain = Plain(5)
        checkpointer = api.Checkpointer(
            tmp_path,
            {"plain": plain},
            custom_load_hooks={"plain": loader},
            custom_save_hooks={"plain": saver},
        )
        checkpointer.save_checkpoint(end_of_epoch=False)
        plain.number = 0
        checkpointer.recover_if_possible()
        assert plain.number == 5
        assert calls == [
            ("save", plain, "plain.ckpt"),
            ("load", plain, "plain.ckpt", False),
        ]

    def test_add_recoverable_takes_hooks_of_one_object(self, api, tmp_path):
        """Another recoverable of the same class keeps the hooks of its class."""
        cls = make_counter_class(api)
        usual, special = cls(1), cls(2)
        checkpointer = api.Checkpointer(tmp_path, {"usual": usual})
        checkpointer.add_recoverable(
            "special",
            special,
            custom_load_hook=lambda obj, path, end_of_epoch: setattr(
                obj, "number", len(Path(path).read_text())
            ),
            custom_save_hook=lambda obj, path: Path(path).write_text("x" * obj.number),
        )
        ckpt = checkpointer.save_checkpoint()
        assert ckpt.paramfiles["special"].read_text() == "xx"
        assert ckpt.paramfiles["usual"].read_text() == "1"
        usual.number = special.number = 0
        checkpointer.recover_if_possible()
        assert (usual.number, special.number) == (1, 2)

    def test_hooks_of_torch_objects_can_be_replaced_too(self, api, tmp_path, scale):
        """A custom hook wins over the default one for modules."""
        model = scale(3)
        checkpointer = api.Checkpointer(
            tmp_path,
            {"model": model},
            custom_save_hooks={"model": lambda obj, path: Path(path).write_text(str(obj.value))},
            custom_load_hooks={
                "model": lambda obj, path, eoe: setattr(obj, "value", float(path.read_text()))
            },
        )
        ckpt = checkpointer.save_checkpoint()
        assert ckpt.paramfiles["model"].read_text() == "3.0"
        model.value = 0
        checkpointer.recover_if_possible()
        assert model.value == 3


class TestListing:
    """`list_checkpoints` tells what is there."""

    def test_only_checkpoint_folders_are_listed(self, api, tmp_path, scale):
        """A folder counts if it starts with CKPT and has a `CKPT.yaml`."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpt = checkpointer.save_checkpoint()
        (tmp_path / "CKPT+no-meta").mkdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "CKPT.yaml").write_text("unixtime: 1.0\nend-of-epoch: true\n")
        (tmp_path / "CKPT+a-file").write_text("no folder")
        (tmp_path / "notes.txt").write_text("no folder either")
        assert checkpointer.list_checkpoints() == [ckpt]

    def test_paramfiles_are_the_files_that_end_in_ckpt(self, api, tmp_path, scale):
        """Whatever else lies in the folder is no paramfile; what was added by hand is."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpt = checkpointer.save_checkpoint()
        (ckpt.path / "notes.txt").write_text("mine")
        (ckpt.path / "extra.ckpt").write_text("also mine")
        (listed,) = checkpointer.list_checkpoints()
        assert listed.paramfiles == {
            "model": ckpt.path / "model.ckpt",
            "extra": ckpt.path / "extra.ckpt",
        }

    def test_a_folder_made_by_hand_is_listed_and_loaded(self, api, tmp_path):
        """A meta file and paramfiles are all that a checkpoint needs."""
        folder = tmp_path / "CKPT+mine"
        folder.mkdir()
        (folder / "CKPT.yaml").write_text("unixtime: 1.0\nend-of-epoch: true\nloss: 0.5\n")
        (folder / "counter.ckpt").write_text("12")
        counter = make_counter_class(api)()
        ckpt = api.Checkpointer(tmp_path, {"counter": counter}).recover_if_possible(min_key="loss")
        assert ckpt.path == folder
        assert counter.number == 12


class TestFinding:
    """`find_checkpoint` and `find_checkpoints`."""

    def test_nothing_found_is_none_and_an_empty_list(self, api, tmp_path, scale):
        """An empty folder and a predicate that refuses all give the same."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        assert checkpointer.find_checkpoint() is None
        assert checkpointer.find_checkpoints() == []
        checkpointer.save_checkpoint()
        assert checkpointer.find_checkpoint(ckpt_predicate=lambda ckpt: False) is None
        assert checkpointer.find_checkpoints(ckpt_predicate=lambda ckpt: False) == []
        assert checkpointer.find_checkpoint(min_key="loss") is None

    def test_without_a_key_the_newest_come_first(self, api, tmp_path, scale):
        """Recency is the default importance."""
        ckpts = save_losses(api.Checkpointer(tmp_path, {"model": scale()}), [1.0, 3.0, 2.0])
        finder = api.Checkpointer(tmp_path)
        assert finder.find_checkpoint() == ckpts[-1]
        assert finder.find_checkpoints() == ckpts[::-1]

    def test_min_key_and_max_key_rank_by_meta(self, api, tmp_path, scale):
        """The lowest, or the highest, comes first."""
        a, b, c = save_losses(api.Checkpointer(tmp_path, {"model": scale()}), [2.0, 1.0, 3.0])
        finder = api.Checkpointer(tmp_path)
        assert finder.find_checkpoint(min_key="loss") == b
        assert finder.find_checkpoint(max_key="loss") == c
        assert finder.find_checkpoints(min_key="loss") == [b, a, c]
        assert finder.find_checkpoints(max_key="loss") == [c, a, b]

    @pytest.mark.parametrize("how", ["min_key", "max_key"])
    def test_only_checkpoints_with_the_key_are_considered(self, api, tmp_path, scale, how):
        """One that lacks the key is neither best nor worst: it is not there."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        (with_key,) = save_losses(checkpointer, [2.0])
        checkpointer.save_checkpoint(meta={"error": 1.0})
        assert checkpointer.find_checkpoints(**{how: "loss"}) == [with_key]
        assert checkpointer.find_checkpoint(**{how: "loss"}) == with_key

    def test_importance_key_ranks_by_the_checkpoint(self, api, tmp_path, scale):
        """The function gets a Checkpoint; the highest result comes first."""
        a, b, c = save_losses(api.Checkpointer(tmp_path, {"model": scale()}), [2.0, 1.0, 3.0])
        finder = api.Checkpointer(tmp_path)
        assert finder.find_checkpoint(importance_key=lambda ckpt: -ckpt.meta["loss"]) == b
        assert finder.find_checkpoints(importance_key=lambda ckpt: -ckpt.meta["unixtime"]) == [
            a,
            b,
            c,
        ]

    def test_the_predicate_filters_before_ranking(self, api, tmp_path, scale):
        """It gets Checkpoints, works with every key, and alone leaves the newest."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        a = checkpointer.save_checkpoint(meta={"loss": 2.0, "kind": "full"})
        b = checkpointer.save_checkpoint(meta={"loss": 3.0, "kind": "full"})
        c = checkpointer.save_checkpoint(meta={"loss": 1.0, "kind": "fast"})
        d = checkpointer.save_checkpoint(meta={"kind": "fast"})

        def full(ckpt):
            return ckpt.meta.get("kind") == "full"

        def fast(ckpt):
            return ckpt.meta.get("kind") == "fast"

        assert checkpointer.find_checkpoint(min_key="loss", ckpt_predicate=full) == a
        assert checkpointer.find_checkpoint(max_key="loss", ckpt_predicate=fast) == c
        assert checkpointer.find_checkpoint(ckpt_predicate=full) == b
        assert checkpointer.find_checkpoints(ckpt_predicate=fast) == [d, c]
        # A key function need not bear checkpoints that the predicate has taken out.
        by_loss = {"importance_key": lambda ckpt: -ckpt.meta["loss"]}
        assert (
            checkpointer.find_checkpoint(**by_loss, ckpt_predicate=lambda c: "loss" in c.meta) == c
        )

    def test_max_num_checkpoints_cuts_the_list(self, api, tmp_path, scale):
        """None gives all, and asking for more than there are is no error."""
        ckpts = save_losses(api.Checkpointer(tmp_path, {"model": scale()}), [3.0, 2.0, 1.0])
        finder = api.Checkpointer(tmp_path)
        assert finder.find_checkpoints(max_num_checkpoints=2) == [ckpts[2], ckpts[1]]
        assert finder.find_checkpoints(max_key="loss", max_num_checkpoints=1) == [ckpts[0]]
        assert finder.find_checkpoints(max_num_checkpoints=0) == []
        assert len(finder.find_checkpoints(max_num_checkpoints=None)) == 3
        assert len(finder.find_checkpoints(max_num_checkpoints=10)) == 3

    def test_ties_go_to_the_newer(self, api, tmp_path, scale):
        """With equal importance the newest comes first, for every kind of key."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        _, b, _, d, e = save_losses(checkpointer, [5, 5, 6, 5, 5])
        assert checkpointer.find_checkpoint(min_key="loss") == e
        assert checkpointer.find_checkpoints(min_key="loss", max_num_checkpoints=3) == [e, d, b]
        assert checkpointer.find_checkpoint(importance_key=lambda ckpt: 1) == e
        same = save_losses(checkpointer, [6])
        assert checkpointer.find_checkpoint(max_key="loss") == same[0]

    @pytest.mark.parametrize("key", ["min_key", "max_key"])
    def test_an_importance_key_and_another_key_contradict(self, api, tmp_path, scale, key):
        """The ValueError names the ways of choosing."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        save_losses(checkpointer, [1.0])
        for find in (
            checkpointer.find_checkpoint,
            checkpointer.find_checkpoints,
            checkpointer.recover_if_possible,
        ):
            with pytest.raises(ValueError, match="importance_key"):
                find(importance_key=lambda ckpt: 1, **{key: "loss"})

    def test_ckpt_recency_is_the_time_of_saving(self, api, tmp_path, scale):
        """It is an importance key like any other."""
        first, second = save_losses(api.Checkpointer(tmp_path, {"model": scale()}), [1.0, 2.0])
        assert api.ckpt_recency(first) == first.meta["unixtime"]
        assert api.ckpt_recency(first) < api.ckpt_recency(second)


class TestRecovery:
    """`recover_if_possible` and `load_checkpoint`."""

    def test_without_checkpoints_nothing_happens(self, api, tmp_path, scale):
        """The result is None and the object keeps its state."""
        model = scale(7)
        assert api.Checkpointer(tmp_path, {"model": model}).recover_if_possible() is None
        assert model.value == 7

    def test_a_predicate_that_refuses_all_recovers_nothing(self, api, tmp_path, scale):
        """Filtering everything away is as good as having nothing."""
        model = scale(1)
        checkpointer = api.Checkpointer(tmp_path, {"model": model})
        checkpointer.save_checkpoint()
        model.value = 2
        assert checkpointer.recover_if_possible(ckpt_predicate=lambda ckpt: False) is None
        assert checkpointer.recover_if_possible(min_key="loss") is None
        assert model.value == 2

    def test_the_newest_is_loaded_at_once_and_returned(self, api, tmp_path, scale):
        """By default the newest checkpoint; the objects hold its state afterwards."""
        model = scale(1)
        checkpointer = api.Checkpointer(tmp_path, {"model": model})
        checkpointer.save_checkpoint()
        model.value = 2
        newest = checkpointer.save_checkpoint()
        model.value = 3
        assert checkpointer.recover_if_possible() == newest
        assert model.value == 2

    def test_the_chosen_one_is_loaded(self, api, tmp_path, scale):
        """Every way of finding is a way of recovering."""
        model = scale()
        checkpointer = api.Checkpointer(tmp_path, {"model": model})
        for value in (2, 1, 3):
            model.value = value
            checkpointer.save_checkpoint(meta={"loss": value, "odd": value % 2 == 1})
        for choice, expected in [
            ({"min_key": "loss"}, 1),
            ({"max_key": "loss"}, 3),
            ({"importance_key": lambda ckpt: -abs(ckpt.meta["loss"] - 2)}, 2),
            ({"max_key": "loss", "ckpt_predicate": lambda ckpt: not ckpt.meta["odd"]}, 2),
        ]:
            ckpt = checkpointer.recover_if_possible(**choice)
            assert (ckpt.meta["loss"], model.value) == (expected, expected)

    def test_load_checkpoint_takes_any_checkpoint(self, api, tmp_path, scale):
        """One that was saved or found before, whatever is newer."""
        model = scale(1)
        checkpointer = api.Checkpointer(tmp_path, {"model": model})
        old = checkpointer.save_checkpoint()
        model.value = 2
        checkpointer.save_checkpoint()
        other = scale(0)
        assert api.Checkpointer(tmp_path, {"model": other}).load_checkpoint(old) is None
        assert other.value == 1

    def test_a_paramfile_may_be_added_to_a_found_checkpoint(self, api, tmp_path):
        """A path that the user puts into `paramfiles` is the one that is loaded."""
        cls = make_counter_class(api)
        checkpointer = api.Checkpointer(tmp_path / "run", {"counter": cls(1)})
        ckpt = checkpointer.save_checkpoint()
        (tmp_path / "elsewhere.ckpt").write_text("42")
        ckpt.paramfiles["added"] = tmp_path / "elsewhere.ckpt"
        added = cls()
        checkpointer.add_recoverable("added", added)
        checkpointer.load_checkpoint(ckpt)
        assert added.number == 42

    def test_a_missing_file_raises_and_names_the_recoverable(self, api, tmp_path):
        """RuntimeError with the name and the folder."""
        cls = make_counter_class(api)
        ckpt = api.Checkpointer(tmp_path, {"a": cls(1)}).save_checkpoint()
        checkpointer = api.Checkpointer(tmp_path, {"a": cls()})
        checkpointer.add_recoverable("newcomer", cls())
        with pytest.raises(RuntimeError, match="newcomer") as caught:
            checkpointer.load_checkpoint(ckpt)
        assert str(ckpt.path) in str(caught.value)
        with pytest.raises(RuntimeError, match="newcomer"):
            checkpointer.recover_if_possible()

    def test_files_without_a_recoverable_are_left_alone(self, api, tmp_path):
        """Loading into fewer objects than were saved is no error."""
        cls = make_counter_class(api)
        api.Checkpointer(tmp_path, {"a": cls(1), "b": cls(2)}).save_checkpoint()
        only = cls()
        api.Checkpointer(tmp_path, {"b": only}).recover_if_possible()
        assert only.number == 2

    def test_allow_partial_load_loads_what_is_found(self, api, tmp_path):
        """Objects without a file keep their state."""
        cls = make_counter_class(api)
        api.Checkpointer(tmp_path, {"a": cls(1)}).save_checkpoint()
        found, missing = cls(), cls(7)
        checkpointer = api.Checkpointer(
            tmp_path, {"a": found, "newcomer": missing}, allow_partial_load=True
        )
        checkpointer.recover_if_possible()
        assert (found.number, missing.number) == (1, 7)

    def test_allow_partial_load_can_be_switched_later(self, api, tmp_path):
        """It is a plain attribute."""
        cls = make_counter_class(api)
        api.Checkpointer(tmp_path, {"a": cls(1)}).save_checkpoint()
        checkpointer = api.Checkpointer(tmp_path)
        checkpointer.add_recoverable("newcomer", cls(7))
        assert checkpointer.allow_partial_load is False
        with pytest.raises(RuntimeError):
            checkpointer.recover_if_possible()
        checkpointer.allow_partial_load = True
        assert checkpointer.recover_if_possible() is not None

    def test_optional_load_only_warns(self, api, tmp_path):
        """A missing optional recoverable keeps its state; the UserWarning names it."""
        cls = make_counter_class(api)
        api.Checkpointer(tmp_path, {"a": cls(1)}).save_checkpoint()
        found, missing = cls(), cls(7)
        checkpointer = api.Checkpointer(tmp_path, {"a": found})
        checkpointer.add_recoverable("scaler", missing, optional_load=True)
        with pytest.warns(UserWarning, match="scaler"):
            checkpointer.recover_if_possible()
        assert (found.number, missing.number) == (1, 7)

    def test_optional_load_loads_what_is_there(self, api, tmp_path):
        """Optional is not ignored."""
        cls = make_counter_class(api)
        scaler = cls(3)
        checkpointer = api.Checkpointer(tmp_path)
        checkpointer.add_recoverable("scaler", scaler, optional_load=True)
        checkpointer.save_checkpoint()
        scaler.number = 0
        checkpointer.recover_if_possible()
        assert scaler.number == 3

    @pytest.mark.parametrize("name", ["dataloader", "train_dataloader", "dataloader-TRAIN"])
    def test_a_missing_dataloader_only_warns(self, api, tmp_path, name):
        """A recoverable with `dataloader` in its name may be missing."""
        cls = make_counter_class(api)
        api.Checkpointer(tmp_path, {"a": cls(1)}).save_checkpoint()
        found, missing = cls(), cls(7)
        checkpointer = api.Checkpointer(tmp_path, {"a": found, name: missing})
        with pytest.warns(UserWarning, match=name):
            checkpointer.recover_if_possible()
        assert (found.number, missing.number) == (1, 7)

    def test_an_object_without_a_load_hook_is_refused(self, api, tmp_path):
        """The RuntimeError names the type that nothing knows how to load."""
        api.Checkpointer(
            tmp_path, {"plain": Plain(1)}, custom_save_hooks={"plain": write_number}
        ).save_checkpoint()
        with pytest.raises(RuntimeError, match="Plain"):
            api.Checkpointer(tmp_path, {"plain": Plain()}).recover_if_possible()

    def test_a_model_of_another_shape_is_refused(self, api, tmp_path):
        """Recovery is strict: the RuntimeError tells of the key that does not fit."""
        api.Checkpointer(tmp_path, {"model": torch.nn.Linear(2, 2)}).save_checkpoint()
        for wrong, key in [
            (torch.nn.Linear(2, 3), "weight"),
            (torch.nn.Linear(2, 2, bias=False), "bias"),
        ]:
            with pytest.raises(RuntimeError, match=key):
                api.Checkpointer(tmp_path, {"model": wrong}).recover_if_possible()
