"""Faults of the SpeechBrain checkpointer that this package must not have.

Every test here fails on the original: `pytest --original tests/speechbrain/test_speechbrain_faults.py` shows
it, except where a test is marked as a guard, which holds there, too, and must go on holding here.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from _numbered import Plain, read_number, write_number

from lightning_sbckpt import errors


def write_half_and_fail(obj, path):
    """Write something, then fail, as a full disk does."""
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def number_checkpointer(api, folder, **numbers):
    """A checkpointer of numbers, and these."""
    objects = {name: Plain(number) for name, number in numbers.items()}
    checkpointer = api.Checkpointer(
        folder,
        objects,
        custom_save_hooks=dict.fromkeys(objects, write_number),
        custom_load_hooks=dict.fromkeys(objects, read_number),
    )
    return checkpointer, objects


def make_folder(root, name, meta_text, **files):
    """Make a checkpoint folder by hand, as SpeechBrain writes them."""
    folder = root / f"CKPT+{name}"
    folder.mkdir(parents=True)
    data = meta_text if isinstance(meta_text, bytes) else meta_text.encode()
    (folder / "CKPT.yaml").write_bytes(data)
    for stem, content in files.items():
        (folder / f"{stem}.ckpt").write_bytes(content)
    return folder


class TestAFailedSave:
    """The original writes the meta first, so that a failed save looks like a checkpoint."""

    def test_it_is_no_checkpoint_and_harms_none(self, api, tmp_path, tree_bytes):
        """Nothing new is visible, earlier ones are whole, the error names the recoverable."""
        checkpointer, objects = number_checkpointer(api, tmp_path, first=1, second=2)
        whole = checkpointer.save_checkpoint(meta={"loss": 1.0})
        before = tree_bytes(tmp_path)
        checkpointer.custom_save_hooks["second"] = write_half_and_fail
        with pytest.raises((RuntimeError, OSError)) as caught:
            checkpointer.save_checkpoint(meta={"loss": 0.5})
        assert checkpointer.list_checkpoints() == [whole]
        assert api.Checkpointer(tmp_path).list_checkpoints() == [whole]
        assert tree_bytes(tmp_path) == before
        assert isinstance(caught.value, errors.SaveError)
        assert "'second'" in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        objects["first"].number = 0
        assert checkpointer.recover_if_possible(min_key="loss") == whole
        assert objects["first"].number == 1

    def test_the_next_save_works(self, api, tmp_path):
        """A failure leaves the checkpointer usable, and nothing lying about."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        checkpointer.custom_save_hooks["only"] = write_half_and_fail
        with pytest.raises((RuntimeError, OSError)):
            checkpointer.save_checkpoint()
        checkpointer.custom_save_hooks["only"] = write_number
        ckpt = checkpointer.save_checkpoint()
        assert [
            name for name in os.listdir(tmp_path) if name not in {".lock", "HISTORY.jsonl"}
        ] == [ckpt.path.name]

    def test_it_does_not_replace_a_checkpoint_of_the_same_name(self, api, tmp_path, tree_bytes):
        """A named checkpoint is overwritten in whole or not at all."""
        checkpointer, objects = number_checkpointer(api, tmp_path, first=1, second=2)
        ckpt = checkpointer.save_checkpoint(name="last")
        before = tree_bytes(ckpt.path)
        objects["first"].number = 10
        checkpointer.custom_save_hooks["second"] = write_half_and_fail
        with pytest.raises((RuntimeError, OSError)):
            checkpointer.save_checkpoint(name="last")
        assert tree_bytes(ckpt.path) == before

    def test_it_deletes_nothing(self, api, tmp_path):
        """`save_and_keep_only` that cannot save keeps what there was."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        ckpts = [checkpointer.save_checkpoint() for _ in range(2)]
        checkpointer.custom_save_hooks["only"] = write_half_and_fail
        with pytest.raises((RuntimeError, OSError)):
            checkpointer.save_and_keep_only(num_to_keep=1)
        assert set(checkpointer.list_checkpoints()) == set(ckpts)

    def test_an_object_without_a_hook_leaves_nothing_visible(self, api, tmp_path):
        """All such objects are named at once."""
        checkpointer, _ = number_checkpointer(api, tmp_path, fine=1)
        checkpointer.add_recoverables({"odd": object(), "odder": Plain()})
        with pytest.raises(RuntimeError) as caught:
            checkpointer.save_checkpoint()
        assert checkpointer.list_checkpoints() == []
        assert os.listdir(tmp_path) == []
        assert "'odd'" in str(caught.value) and "'odder'" in str(caught.value)

    def test_a_meta_that_yaml_cannot_hold_is_refused_by_key(self, api, tmp_path):
        """The original writes it with a Python tag, and cannot list the folder afterwards."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        with pytest.raises(ValueError, match="model") as caught:
            checkpointer.save_checkpoint(meta={"loss": 1.0, "model": Plain()})
        assert isinstance(caught.value, errors.MetaError)
        assert "Plain" in str(caught.value)
        assert checkpointer.list_checkpoints() == []


class TestNothingLeaksBetweenCalls:
    """The original has mutable defaults, and changes what it is given."""

    def test_keep_recent_does_not_leak_into_later_calls(self, api, tmp_path):
        """Once keep_recent was used, the original keeps the recent ones for ever after."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        checkpointer.save_and_keep_only(meta={"loss": 1.0})
        checkpointer.save_and_keep_only(meta={"loss": 5.0}, keep_recent=False, min_keys=["loss"])
        assert [ckpt.meta["loss"] for ckpt in checkpointer.list_checkpoints()] == [1.0]

    def test_the_lists_given_are_not_changed(self, api, tmp_path):
        """The caller's own lists stay as they are."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        importance_keys = [lambda ckpt: 1]
        min_keys = ["loss"]
        checkpointer.save_and_keep_only(
            meta={"loss": 1.0}, importance_keys=importance_keys, min_keys=min_keys
        )
        assert len(importance_keys) == 1
        assert min_keys == ["loss"]


class TestContradictions:
    """The original silently takes max_key when min_key is given, too."""

    def test_min_key_and_max_key_together_are_refused(self, api, tmp_path):
        """ValueError from every method that chooses, naming both."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        checkpointer.save_checkpoint(meta={"loss": 1.0, "acc": 1.0})
        for find in (
            checkpointer.find_checkpoint,
            checkpointer.find_checkpoints,
            checkpointer.recover_if_possible,
        ):
            with pytest.raises(ValueError, match=r"(?s)m\w+_key.*m\w+_key") as caught:
                find(min_key="loss", max_key="acc")
            assert isinstance(caught.value, errors.SelectionError)

    def test_they_are_refused_in_an_empty_folder_too(self, api, tmp_path):
        """The mistake shows in the first run, not in the first resumed one."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        with pytest.raises(ValueError, match="min_key"):
            checkpointer.recover_if_possible(min_key="loss", max_key="acc")


class TestMissingFiles:
    """The original forgets the optional flag in `add_recoverables`, and reports one at a time."""

    def test_all_missing_recoverables_are_named_and_nothing_is_loaded(self, api, tmp_path):
        """One RuntimeError instead of a bare KeyError, before any object has changed."""
        checkpointer, _ = number_checkpointer(api, tmp_path, present=1)
        ckpt = checkpointer.save_checkpoint()
        again, objects = number_checkpointer(api, tmp_path, present=7, lost=8, gone=9)
        with pytest.raises((RuntimeError, KeyError)) as caught:
            again.recover_if_possible()
        assert isinstance(caught.value, errors.MismatchError)
        assert isinstance(caught.value, RuntimeError)
        message = str(caught.value)
        assert "'lost'" in message and "'gone'" in message and str(ckpt.path) in message
        assert "optional_load" in message and "allow_partial_load" in message
        assert [obj.number for obj in objects.values()] == [7, 8, 9]

    def test_directly_set_recoverables_are_treated_alike(self, api, tmp_path):
        """As if they had been added by the method."""
        checkpointer, _ = number_checkpointer(api, tmp_path, present=1)
        checkpointer.save_checkpoint()
        checkpointer.recoverables["lost"] = Plain()
        with pytest.raises((RuntimeError, KeyError)) as caught:
            checkpointer.recover_if_possible()
        assert isinstance(caught.value, RuntimeError)
        assert "'lost'" in str(caught.value)

    def test_an_optional_recoverable_stays_optional(self, api, tmp_path):
        """Guard: adding it again in a mapping does not take the flag away."""
        checkpointer, _ = number_checkpointer(api, tmp_path, present=1)
        checkpointer.save_checkpoint()
        checkpointer.add_recoverable("scaler", Plain(), optional_load=True)
        checkpointer.add_recoverables({"scaler": Plain(3)})
        with pytest.warns(UserWarning, match="scaler"):
            assert checkpointer.recover_if_possible() is not None


class TestNaN:
    """In the original a NaN breaks the sorting, and with it what is best and what is deleted."""

    @pytest.mark.parametrize("values", list(itertools.permutations([math.nan, 1.0, 2.0])))
    def test_it_ranks_worst_whatever_the_order(self, api, tmp_path, values):
        """Worst as a lowest and worst as a highest value."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        for value in values:
            checkpointer.save_checkpoint(meta={"loss": value})

        def ranked(**key):
            return [str(ckpt.meta["loss"]) for ckpt in checkpointer.find_checkpoints(**key)]

        assert ranked(min_key="loss") == ["1.0", "2.0", "nan"]
        assert ranked(max_key="loss") == ["2.0", "1.0", "nan"]
        assert ranked(importance_key=lambda ckpt: ckpt.meta["loss"]) == ["2.0", "1.0", "nan"]
        assert checkpointer.find_checkpoint(min_key="loss").meta["loss"] == 1.0

    @pytest.mark.parametrize("values", list(itertools.permutations([math.nan, 1.0, 2.0])))
    def test_retention_keeps_the_best_number(self, api, tmp_path, values):
        """A NaN never pushes out a number."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        for value in values:
            checkpointer.save_and_keep_only(
                meta={"loss": value}, keep_recent=False, min_keys=["loss"], importance_keys=[]
            )
        assert [ckpt.meta["loss"] for ckpt in checkpointer.list_checkpoints()] == [1.0]

    def test_infinity_is_a_number(self, api, tmp_path):
        """It ranks as such, before NaN."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        for value in (math.inf, math.nan, -math.inf, 0.0):
            checkpointer.save_checkpoint(meta={"loss": value})
        found = [ckpt.meta["loss"] for ckpt in checkpointer.find_checkpoints(min_key="loss")]
        assert found[:3] == [-math.inf, 0.0, math.inf]
        assert math.isnan(found[3])

    @pytest.mark.parametrize("value", ["low", [0.0]])
    def test_a_value_that_is_no_number_is_named(self, api, tmp_path, value):
        """Not a bare TypeError from within the sort, but the key, the checkpoint and the value."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        odd = checkpointer.save_checkpoint(meta={"loss": value})
        checkpointer.save_checkpoint(meta={"loss": 1.0})
        with pytest.raises((ValueError, TypeError)) as caught:
            checkpointer.find_checkpoint(min_key="loss")
        assert isinstance(caught.value, errors.SelectionError)
        for part in ("'loss'", str(odd.path), repr(value)):
            assert part in str(caught.value)


class TestMetaOfStrangers:
    """In the original one unreadable `CKPT.yaml` makes every listing fail."""

    def test_a_python_tag_is_not_executed_and_only_its_folder_is_skipped(
        self, api, tmp_path, caplog
    ):
        """Older SpeechBrains execute it; the healthy checkpoints are listed, with one warning."""
        checkpointer, objects = number_checkpointer(api, tmp_path, only=1)
        healthy = checkpointer.save_checkpoint(meta={"loss": 1.0})
        target = tmp_path / "executed"
        make_folder(
            tmp_path,
            "evil",
            "unixtime: 9999999999.0\nend-of-epoch: true\nloss: 0.0\n"
            f'x: !!python/object/apply:os.mkdir ["{target}"]\n',
            only=b"666",
        )
        finder = api.Checkpointer(tmp_path)
        assert finder.list_checkpoints() == [healthy]
        assert finder.find_checkpoint(min_key="loss") == healthy
        objects["only"].number = 0
        assert checkpointer.recover_if_possible() == healthy
        assert objects["only"].number == 1
        assert not target.exists()
        warnings = [rec.getMessage() for rec in caplog.records if rec.levelname == "WARNING"]
        assert any("CKPT+evil" in message for message in warnings)

    @pytest.mark.parametrize(
        "meta",
        [
            "",
            "- a\n- list\n",
            "just text",
            "unixtime: [1.0\n",
            b"\xff\xfe\x00 no text",
            "? {a: 1}\n: 2\n",
        ],
        ids=["empty", "list", "text", "cut", "binary", "mapping-as-key"],
    )
    def test_a_meta_that_is_none_is_skipped_with_a_warning(self, api, tmp_path, caplog, meta):
        """The rest is listed as if that folder were not there."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        healthy = checkpointer.save_checkpoint()
        make_folder(tmp_path, "broken", meta)
        finder = api.Checkpointer(tmp_path)
        assert finder.list_checkpoints() == [healthy]
        assert finder.find_checkpoint() == healthy
        warnings = [rec.getMessage() for rec in caplog.records if rec.levelname == "WARNING"]
        assert any("CKPT+broken" in message for message in warnings)

    @pytest.mark.parametrize("time_line", ["", "unixtime: soon\n", "unixtime: null\n"])
    def test_one_without_a_time_counts_as_the_oldest(self, api, tmp_path, time_line):
        """It can be found, and is never taken for the newest."""
        make_folder(tmp_path, "timeless", f"{time_line}end-of-epoch: true\n", only=b"3")
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        healthy = checkpointer.save_checkpoint()
        found = checkpointer.find_checkpoints()
        assert found[0] == healthy
        assert [ckpt.path.name for ckpt in found[1:]] == ["CKPT+timeless"]

    def test_one_without_end_of_epoch_still_loads(self, api, tmp_path):
        """The end of an epoch is the default, as in saving."""
        make_folder(tmp_path, "short", "unixtime: 1.0\n", only=b"3")
        checkpointer, objects = number_checkpointer(api, tmp_path, only=0)
        assert checkpointer.recover_if_possible() is not None
        assert objects["only"].number == 3

    def test_a_tensor_in_the_meta_comes_back(self, api, tmp_path):
        """One element becomes a plain number; more of them a tensor again."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        saved = checkpointer.save_checkpoint(
            meta={"loss": torch.tensor(0.5), "per_class": torch.tensor([1.0, 2.0, 3.0])}
        )
        (listed,) = api.Checkpointer(tmp_path).list_checkpoints()
        assert saved.meta["loss"] == listed.meta["loss"] == 0.5
        assert isinstance(listed.meta["loss"], float)
        assert torch.equal(listed.meta["per_class"], torch.tensor([1.0, 2.0, 3.0]))
        assert torch.equal(saved.meta["per_class"], listed.meta["per_class"])
        assert checkpointer.find_checkpoint(min_key="loss").path == saved.path


class TestAveraging:
    """The original sums in place, into the first state it is given, and divides everything."""

    def test_integer_buffers_stay_integers(self, api):
        """BatchNorm's `num_batches_tracked` is a count: int64 before, int64 after."""
        states = []
        for batches in (2, 3, 4):
            norm = torch.nn.BatchNorm1d(2)
            norm.num_batches_tracked.fill_(batches)
            norm.running_mean.fill_(float(batches))
            states.append(norm.state_dict())
        average = api.average_state_dicts(states)
        assert average["num_batches_tracked"].dtype == torch.int64
        assert 2 <= average["num_batches_tracked"].item() <= 4
        assert average["running_mean"].tolist() == [3.0, 3.0]
        torch.nn.BatchNorm1d(2).load_state_dict(average)

    def test_booleans_stay_booleans(self, api):
        """A mask is no number."""
        states = [{"mask": torch.tensor([True, False]), "w": torch.tensor([x])} for x in (1.0, 3.0)]
        average = api.average_state_dicts(states)
        assert average["mask"].dtype == torch.bool
        assert average["mask"].tolist() == [True, False]
        assert average["w"].item() == 2.0

    def test_what_is_averaged_does_not_change(self, api):
        """A live model's own state may be among the states."""
        models = [torch.nn.Linear(2, 2) for _ in range(2)]
        before = [model.weight.detach().clone() for model in models]
        average = api.average_state_dicts([model.state_dict() for model in models])
        for model, weight in zip(models, before, strict=True):
            assert torch.equal(model.weight, weight)
        assert torch.allclose(average["weight"], (before[0] + before[1]) / 2)

    def test_half_precision_keeps_its_type_and_does_not_overflow(self, api):
        """The mean of large half-precision numbers is a number, not infinity."""
        states = [{"w": torch.tensor([60000.0], dtype=torch.float16)} for _ in range(4)]
        average = api.average_state_dicts(states)
        assert average["w"].dtype == torch.float16
        assert average["w"].item() == 60000.0

    def test_states_that_do_not_match_are_refused(self, api):
        """A key that is in one state only, or of another shape, is named."""
        for other in ({"a": torch.ones(1)}, {"a": torch.ones(1), "odd": torch.ones(2)}):
            with pytest.raises((RuntimeError, ValueError), match="odd"):
                api.average_state_dicts([{"a": torch.ones(1), "odd": torch.ones(1)}, other])

    def test_a_loader_of_one_argument_works_as_documented(self, api, tmp_path):
        """`parameter_loader` is promised a path; the original passes `map_location`, too."""
        checkpointer, objects = number_checkpointer(api, tmp_path, only=2)
        checkpointer.save_checkpoint()
        objects["only"].number = 4
        checkpointer.save_checkpoint()
        average = api.average_checkpoints(
            checkpointer.find_checkpoints(),
            "only",
            parameter_loader=lambda path: {"n": torch.tensor(float(Path(path).read_text()))},
        )
        assert average["n"].item() == 3.0


class TestClock:
    """The original's order hangs on a clock that can stand still or jump."""

    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that shows what it is set to."""

        class Clock:
            now = 1_800_000_000.25

        monkeypatch.setattr(time, "time", lambda: Clock.now)
        monkeypatch.setattr(time, "time_ns", lambda: int(Clock.now * 1e9))
        return Clock

    def test_saves_at_one_instant_are_ordered(self, api, tmp_path, clock):
        """Each gets a folder and a later time than the one before."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        ckpts = [checkpointer.save_checkpoint(meta={"loss": 1.0}) for _ in range(4)]
        assert len({ckpt.path for ckpt in ckpts}) == 4
        times = [ckpt.meta["unixtime"] for ckpt in ckpts]
        assert times == sorted(set(times))
        assert api.Checkpointer(tmp_path).find_checkpoints() == ckpts[::-1]
        assert checkpointer.find_checkpoint(min_key="loss") == ckpts[-1]
        checkpointer.delete_checkpoints()
        assert checkpointer.list_checkpoints() == [ckpts[-1]]

    def test_a_clock_that_jumps_back_does_not_change_the_order(self, api, tmp_path, clock):
        """The later save is the newer one, also for a checkpointer that starts anew."""
        checkpointer, objects = number_checkpointer(api, tmp_path, only=1)
        first = checkpointer.save_checkpoint()
        clock.now -= 3600
        objects["only"].number = 2
        second = checkpointer.save_checkpoint()
        assert second.meta["unixtime"] > first.meta["unixtime"]
        restarted, objects = number_checkpointer(api, tmp_path, only=3)
        third = restarted.save_checkpoint()
        assert third.meta["unixtime"] > second.meta["unixtime"]
        assert restarted.find_checkpoints() == [third, second, first]
        objects["only"].number = 0
        assert restarted.recover_if_possible() == third
        assert objects["only"].number == 3

    def test_keep_recent_keeps_the_save_after_the_jump(self, api, tmp_path, clock):
        """Or a run would delete each checkpoint as soon as it is made."""
        checkpointer, _ = number_checkpointer(api, tmp_path, only=1)
        checkpointer.save_and_keep_only(meta={"epoch": 1})
        clock.now -= 3600
        checkpointer.save_and_keep_only(meta={"epoch": 2})
        assert [ckpt.meta["epoch"] for ckpt in checkpointer.list_checkpoints()] == [2]


class TestNames:
    """In the original a name may lead out of the folder."""

    @pytest.mark.parametrize(
        "name", ["../out", "a/b", "/abs", "a\\b", "..", ".", "", "nul\0", "line\nbreak"]
    )
    def test_recoverables_cannot_leave_the_checkpoint(self, api, tmp_path, name, tree_bytes):
        """Refused when added in each way, and when put in directly at the latest on saving."""
        root = tmp_path / "run"
        checkpointer, _ = number_checkpointer(api, root)
        for add in (
            lambda: checkpointer.add_recoverable(name, torch.nn.Linear(1, 1)),
            lambda: checkpointer.add_recoverables({name: torch.nn.Linear(1, 1)}),
            lambda: api.Checkpointer(root, {name: torch.nn.Linear(1, 1)}),
        ):
            with pytest.raises(errors.CheckpointNameError, match="recoverable"):
                add()
        assert checkpointer.recoverables == {}
        checkpointer.recoverables[name] = torch.nn.Linear(1, 1)
        with pytest.raises(errors.CheckpointNameError, match="recoverable"):
            checkpointer.save_checkpoint()
        assert tree_bytes(tmp_path) == {}

    @pytest.mark.parametrize("name", ["/../../out", "a/b", "a\\b", "..", "", "nul\0"])
    def test_checkpoints_cannot_leave_the_folder(self, api, tmp_path, name, tree_bytes):
        """The error shows the name, and nothing is written anywhere."""
        root = tmp_path / "run"
        checkpointer = api.Checkpointer(root, {"model": torch.nn.Linear(1, 1)})
        for save in (checkpointer.save_checkpoint, checkpointer.save_and_keep_only):
            with pytest.raises(errors.CheckpointNameError, match=re.escape(repr(name))):
                save(name=name)
        assert tree_bytes(tmp_path) == {}

    @pytest.mark.parametrize("name", ["CKPT", "MANIFEST"])
    def test_names_of_the_format_are_no_trouble(self, api, tmp_path, name):
        """Guard: a recoverable may be called like one of the two YAML files."""
        model = torch.nn.Linear(1, 1)
        checkpointer = api.Checkpointer(tmp_path, {name: model})
        ckpt = checkpointer.save_checkpoint(name=name)
        weight = model.weight.detach().clone()
        torch.nn.init.zeros_(model.weight)
        assert checkpointer.recover_if_possible() == ckpt
        assert torch.equal(model.weight, weight)

    def test_a_name_used_again_leaves_nothing_of_the_old(self, api, tmp_path):
        """The original writes into the old folder: files of both saves lie together."""
        first, _ = number_checkpointer(api, tmp_path, kept=1, dropped=2)
        first.save_checkpoint(name="last")
        second, _ = number_checkpointer(api, tmp_path, kept=3)
        second.save_checkpoint(name="last")
        (ckpt,) = second.list_checkpoints()
        assert set(ckpt.paramfiles) == {"kept"}


class Payload:
    """A pickle of this makes a folder when it is read by a careless reader."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        """Say what unpickling calls."""
        return os.mkdir, (self.target,)


class TestPickle:
    """Guards: nothing in a checkpoint folder is executed."""

    @pytest.fixture(params=["torch.save", "pickle"])
    def poisoned(self, request, tmp_path):
        """A folder whose model file holds code, and the folder that the code would make."""
        target = tmp_path / "executed"
        file = tmp_path / "payload"
        if request.param == "torch.save":
            torch.save({"weight": Payload(target)}, file)
        else:
            file.write_bytes(pickle.dumps({"weight": Payload(target)}, protocol=2))
        make_folder(
            tmp_path / "run",
            "evil",
            "unixtime: 1.0\nend-of-epoch: true\nloss: 0.0\n",
            model=file.read_bytes(),
        )
        return tmp_path / "run", target

    def test_listing_finding_and_recovering_execute_nothing(self, api, poisoned):
        """Loading is refused with an error that names the file."""
        root, target = poisoned
        checkpointer = api.Checkpointer(root, {"model": torch.nn.Linear(1, 1)})
        assert len(checkpointer.list_checkpoints()) == 1
        ckpt = checkpointer.find_checkpoint(min_key="loss")
        for load in (
            checkpointer.recover_if_possible,
            lambda: checkpointer.load_checkpoint(ckpt),
        ):
            with pytest.raises(Exception, match=r"(?i)pickle|weights"):
                load()
        assert not target.exists()

    def test_the_refusal_names_the_file_and_what_to_do(self, api, poisoned):
        """UntrustedPickleError, on every way into the file."""
        root, target = poisoned
        path = root / "CKPT+evil" / "model.ckpt"
        model = torch.nn.Linear(1, 1)
        ckpts = api.Checkpointer(root).list_checkpoints()

        def pretrain():
            pretrainer = api.Pretrainer(loadables={"model": model}, paths={"model": str(path)})
            pretrainer.collect_files()
            pretrainer.load_collected()

        for load in (
            api.Checkpointer(root, {"model": model}).recover_if_possible,
            lambda: api.torch_recovery(model, path, True),
            lambda: api.torch_parameter_transfer(model, path),
            lambda: api.average_checkpoints(ckpts, "model"),
            pretrain,
        ):
            with pytest.raises(errors.UntrustedPickleError, match=re.escape(str(path))) as caught:
                load()
            assert "trust" in str(caught.value)
        assert not target.exists()

    def test_the_payload_does_what_it_should(self, poisoned):
        """Guard of the guards: read carelessly, the file does make the folder."""
        root, target = poisoned
        path = root / "CKPT+evil" / "model.ckpt"
        assert not target.exists()
        with contextlib.suppress(Exception):  # The bare pickle is no torch file, yet it runs.
            torch.load(path, weights_only=False)
        assert target.is_dir()


class TestEarlyStoppingCounter:
    """In the original the stopper's own hooks are never registered, so its state is lost."""

    def test_its_state_survives(self, api, tmp_path):
        """Epoch, best epoch, best score and the decision to stop come back."""
        counter = api.EpochCounterWithStopper(10, 2, 0, "min")
        for epoch, metric in zip(counter, [3.0, 1.0, 2.0, 2.0], strict=False):
            counter.update_metric(metric)
            assert epoch == counter.current
        assert counter.should_stop
        api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint()
        again = api.EpochCounterWithStopper(10, 2, 0, "min")
        api.Checkpointer(tmp_path, {"epochs": again}).recover_if_possible()
        assert (again.current, again.best_limit, again.best_score) == (4, 2, 1.0)
        assert again.should_stop is True
        assert list(again) == []

    def test_patience_goes_on_counting_after_recovery(self, api, tmp_path):
        """Epochs without improvement before and after the interruption add up."""
        counter = api.EpochCounterWithStopper(10, 3, 0, "min")
        for epoch, metric in zip(counter, [1.0, 2.0], strict=False):
            counter.update_metric(metric)
            if epoch == 2:
                break
        api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint()
        again = api.EpochCounterWithStopper(10, 3, 0, "min")
        api.Checkpointer(tmp_path, {"epochs": again}).recover_if_possible()
        seen = []
        for epoch in again:
            seen.append(epoch)
            again.update_metric(2.0)
        assert seen == [3, 4]

    def test_a_constant_negative_metric_is_no_improvement(self, api):
        """The original scales its margin with the score, so that below zero it counts wrongly."""
        counter = api.EpochCounterWithStopper(20, 3, 0, "min")
        for _ in counter:
            counter.update_metric(-1.0)
        assert counter.current == 4

    def test_the_file_is_yaml_that_a_person_can_read(self, api, tmp_path):
        """Plain keys, plain values."""
        counter = api.EpochCounterWithStopper(10, 2, 0, "max")
        next(counter)
        counter.update_metric(0.5)
        ckpt = api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint()
        state = yaml.safe_load(ckpt.paramfiles["epochs"].read_text())
        assert state["current_epoch"] == 1
        assert state["best_epoch"] == 1
        assert state["best_score"] == 0.5
        assert state["should_stop"] is False
