"""What SpeechBrain documents about epoch counters, averaging, transfer and `Pretrainer`.

Sources: the docstrings and unit tests of `speechbrain.utils.epoch_loop`, `checkpoints` and
`parameter_transfer`.

`pytest --original` with this file runs every test against the real SpeechBrain.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from _numbered import Plain, make_counter_class


class TestEpochCounter:
    """`EpochCounter` counts from one and goes on where it stopped."""

    def test_it_counts_from_one_to_the_limit(self, api):
        """The numbers are 1 to limit, and `current` is the last one given."""
        counter = api.EpochCounter(3)
        assert counter.current == 0
        assert list(counter) == [1, 2, 3]
        assert counter.current == 3
        assert list(counter) == []

    def test_the_limit_is_made_an_integer(self, api):
        """A limit that came as a whole float, from a configuration file say, is fine."""
        counter = api.EpochCounter(2.0)
        assert type(counter.limit) is int
        assert list(counter) == [1, 2]

    def test_it_goes_on_after_an_end_of_epoch_checkpoint(self, api, tmp_path):
        """Recovered, the next epoch is the one after."""
        counter = api.EpochCounter(4)
        next(counter)
        next(counter)
        api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint()
        again = api.EpochCounter(4)
        api.Checkpointer(tmp_path, {"epochs": again}).recover_if_possible()
        assert again.current == 2
        assert list(again) == [3, 4]

    def test_an_epoch_that_was_not_finished_is_repeated(self, api, tmp_path):
        """After an intra-epoch checkpoint, the same epoch comes again."""
        counter = api.EpochCounter(2)
        checkpointer = api.Checkpointer(tmp_path, {"epochs": counter})
        for epoch in counter:
            assert epoch == 1
            checkpointer.save_checkpoint(end_of_epoch=False)
            break
        checkpointer.recover_if_possible()
        seen = []
        for epoch in counter:
            seen.append(epoch)
            checkpointer.save_checkpoint(end_of_epoch=True)
        assert seen == [1, 2]
        checkpointer.recover_if_possible()
        assert list(counter) == []

    def test_its_file_is_a_number_that_a_person_can_read(self, api, tmp_path):
        """The paramfile holds the current epoch as text."""
        counter = api.EpochCounter(5)
        next(counter)
        ckpt = api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint()
        assert ckpt.paramfiles["epochs"].read_text().strip() == "1"

    def test_a_raised_limit_goes_on(self, api, tmp_path):
        """The limit is not restored: a finished run can be made longer."""
        counter = api.EpochCounter(2)
        list(counter)
        api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint()
        longer = api.EpochCounter(3)
        api.Checkpointer(tmp_path, {"epochs": longer}).recover_if_possible()
        assert list(longer) == [3]


class TestEpochCounterWithStopper:
    """`EpochCounterWithStopper(limit, limit_to_stop, limit_warmup, direction)`."""

    def test_it_stops_when_patience_is_exhausted(self, api):
        """Best in the first epoch after two of warmup, then five without improvement."""
        counter = api.EpochCounterWithStopper(10, 5, 2, "min")
        seen = []
        for epoch in counter:
            seen.append(epoch)
            counter.update_metric(0)
        assert seen == [1, 2, 3, 4, 5, 6, 7, 8]
        assert counter.should_stop is True

    @pytest.mark.parametrize(
        ("direction", "metrics", "stops_after", "best"),
        [
            ("min", [5.0, 4.0, 3.0, 3.5, 3.2, 9.0], 5, (3, 3.0)),
            ("max", [0.1, 0.4, 0.3, 0.2, 0.9, 0.9], 4, (2, 0.4)),
            ("max", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, (6, 0.6)),
        ],
    )
    def test_it_tracks_the_best_in_its_direction(self, api, direction, metrics, stops_after, best):
        """`best_limit` is the best epoch, `best_score` its metric."""
        counter = api.EpochCounterWithStopper(6, 2, 0, direction)
        last = 0
        for epoch in counter:
            last = epoch
            counter.update_metric(metrics[epoch - 1])
        assert last == stops_after
        assert (counter.best_limit, counter.best_score) == best

    def test_nothing_counts_during_warmup(self, api):
        """A metric seen in warmup neither stops nor is best."""
        counter = api.EpochCounterWithStopper(10, 1, 3, "min")
        for epoch, metric in zip(counter, [0.0, 5.0, 5.0, 3.0, 4.0, 2.0], strict=False):
            counter.update_metric(metric)
            if epoch <= 3:
                assert not counter.should_stop
        assert (counter.current, counter.best_limit, counter.best_score) == (5, 4, 3.0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((10, -1, 0, "min"), "limit_to_stop"),
            ((10, 1, -1, "min"), "limit_warmup"),
            ((10, 1, 0, "down"), "direction"),
        ],
    )
    def test_wrong_arguments_are_refused(self, api, arguments, message):
        """The ValueError names the argument."""
        with pytest.raises(ValueError, match=message):
            api.EpochCounterWithStopper(*arguments)

    def test_an_epoch_that_was_not_finished_is_repeated(self, api, tmp_path):
        """As with the plain counter."""
        counter = api.EpochCounterWithStopper(10, 3, 0, "min")
        next(counter)
        next(counter)
        api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint(end_of_epoch=False)
        again = api.EpochCounterWithStopper(10, 3, 0, "min")
        api.Checkpointer(tmp_path, {"epochs": again}).recover_if_possible()
        assert next(again) == 2


class TestAveraging:
    """`average_state_dicts` and `average_checkpoints`."""

    def test_the_average_of_state_dicts(self, api):
        """Any iterable will do, and each entry is the mean."""
        states = ({"a": torch.tensor([x]), "b": torch.tensor([[2 * x]])} for x in (1.0, 2.0, 6.0))
        average = api.average_state_dicts(states)
        assert average["a"].item() == 3.0
        assert average["b"].tolist() == [[6.0]]

    def test_one_state_dict_is_its_own_average(self, api):
        """Nothing to add is no problem."""
        assert api.average_state_dicts([{"a": torch.tensor([2.0])}])["a"].item() == 2.0

    def test_no_state_dict_is_refused(self, api):
        """ValueError for an empty iterable."""
        with pytest.raises(ValueError, match="average"):
            api.average_state_dicts([])

    def test_the_average_of_checkpoints_loads_into_the_model(self, api, tmp_path, scale):
        """The newest three of ten, as the documentation shows it."""
        model = scale()
        checkpointer = api.Checkpointer(tmp_path, {"model": model, "other": scale(100)})
        for value in range(10):
            model.value = value
            checkpointer.save_checkpoint()
        newest = checkpointer.find_checkpoints(max_num_checkpoints=3)
        model.load_state_dict(api.average_checkpoints(newest, "model"))
        assert model.value == 8.0

    def test_loader_and_averager_can_be_given(self, api, tmp_path):
        """The averager gets an iterator over what the loader reads."""
        checkpointer = api.Checkpointer(tmp_path, {"counter": (counter := api.EpochCounter(9))})
        for _ in range(3):
            next(counter)
            checkpointer.save_checkpoint()

        def loader(path, map_location=None):
            return {"epoch": int(Path(path).read_text())}

        def averager(states):
            assert iter(states) is states
            return sum(state["epoch"] for state in states) / 3

        ckpts = checkpointer.find_checkpoints()
        average = api.average_checkpoints(
            ckpts, "counter", parameter_loader=loader, averager=averager
        )
        assert average == 2.0

    def test_no_checkpoints_are_refused(self, api):
        """ValueError, as for no state dicts."""
        with pytest.raises(ValueError, match="average"):
            api.average_checkpoints([], "model")


class TestParameterTransfer:
    """`torch_parameter_transfer` takes what fits by name."""

    def test_matching_layers_are_loaded_and_others_warned_of(self, api, tmp_path, caplog):
        """One warning for each key that is missing, one for each that is left over."""
        source = torch.nn.Sequential()
        source.add_module("same", torch.nn.Linear(2, 2))
        source.add_module("old", torch.nn.Linear(1, 1))
        target = torch.nn.Sequential()
        target.add_module("same", torch.nn.Linear(2, 2))
        target.add_module("new", torch.nn.Linear(1, 1))
        torch.save(source.state_dict(), tmp_path / "model.ckpt")
        before = target.new.weight.clone()
        api.torch_parameter_transfer(target, tmp_path / "model.ckpt")
        assert torch.equal(target.same.weight, source.same.weight)
        assert torch.equal(target.same.bias, source.same.bias)
        assert torch.equal(target.new.weight, before)
        messages = [rec.getMessage() for rec in caplog.records if rec.levelno == logging.WARNING]
        for key in ("new.weight", "new.bias", "old.weight", "old.bias"):
            (message,) = [m for m in messages if key in m]
            assert "model.ckpt" in message
        assert not any("same." in message for message in messages)

    def test_a_perfect_match_warns_of_nothing(self, api, tmp_path, scale, caplog):
        """Silence when everything fits; the path may be a str."""
        torch.save(scale(4).state_dict(), tmp_path / "model.ckpt")
        target = scale(0)
        api.torch_parameter_transfer(target, str(tmp_path / "model.ckpt"))
        assert target.value == 4
        assert [rec for rec in caplog.records if rec.levelno >= logging.WARNING] == []


class TestPretrainer:
    """`Pretrainer` collects parameter files and loads them."""

    @pytest.fixture
    def source(self, tmp_path, scale):
        """A folder with the parameters of two models."""
        folder = tmp_path / "source"
        folder.mkdir()
        torch.save(scale(1).state_dict(), folder / "first.ckpt")
        torch.save(scale(2).state_dict(), folder / "second.ckpt")
        return folder

    def test_a_default_source_serves_what_has_no_path(self, api, tmp_path, source, scale):
        """`<default_source>/<name>.ckpt` is collected into `collect_in` and loaded."""
        first, second = scale(0), scale(0)
        pretrainer = api.Pretrainer(
            collect_in=tmp_path / "collected", loadables={"first": first, "second": second}
        )
        paths = pretrainer.collect_files(default_source=str(source))
        assert set(paths) == {"first", "second"}
        assert sorted(os.listdir(tmp_path / "collected")) == ["first.ckpt", "second.ckpt"]
        pretrainer.load_collected()
        assert (first.value, second.value) == (1, 2)

    def test_a_default_source_may_be_a_path(self, api, tmp_path, source, scale):
        """Not only a str."""
        first = scale(0)
        pretrainer = api.Pretrainer(collect_in=tmp_path / "collected", loadables={"first": first})
        pretrainer.collect_files(default_source=source)
        pretrainer.load_collected()
        assert first.value == 1

    def test_paths_win_over_the_default_source(self, api, tmp_path, source, scale):
        """The last part of a path is the file name, which need not be the loadable's."""
        (tmp_path / "mine").mkdir()
        torch.save(scale(7).state_dict(), tmp_path / "mine" / "weights.pt")
        first, second = scale(0), scale(0)
        pretrainer = api.Pretrainer(
            collect_in=tmp_path / "collected",
            loadables={"first": first, "second": second},
            paths={"first": f"{tmp_path}/mine/weights.pt"},
        )
        pretrainer.collect_files(default_source=str(source))
        pretrainer.load_collected()
        assert (first.value, second.value) == (7, 2)
        assert (tmp_path / "collected" / "first.ckpt").exists()

    def test_without_collect_in_files_are_read_where_they_are(self, api, source, scale):
        """The mapping returned leads to the parameters of each loadable."""
        first = scale(0)
        pretrainer = api.Pretrainer(loadables={"first": first})
        paths = pretrainer.collect_files(default_source=str(source))
        assert torch.load(paths["first"], weights_only=True)["param"].item() == 1
        pretrainer.load_collected()
        assert first.value == 1

    def test_everything_can_be_added_later(self, api, tmp_path, source, scale):
        """set_collect_in, add_loadables, add_paths, add_custom_hooks, add_conditions."""
        first, second, third = scale(0), scale(0), scale(0)
        pretrainer = api.Pretrainer()
        pretrainer.set_collect_in(tmp_path / "collected")
        pretrainer.add_loadables({"first": first})
        pretrainer.add_loadables({"second": second, "third": third})
        pretrainer.add_paths({"first": f"{source}/second.ckpt", "second": f"{source}/first.ckpt"})
        pretrainer.add_custom_hooks({"second": lambda obj, path: setattr(obj, "value", 9)})
        pretrainer.add_conditions({"third": False})
        assert pretrainer.collect_in == tmp_path / "collected"
        pretrainer.collect_files()
        pretrainer.load_collected()
        assert (first.value, second.value, third.value) == (2, 9, 0)

    def test_no_path_and_no_default_source_is_refused(self, api, tmp_path, scale):
        """The ValueError names the loadable."""
        pretrainer = api.Pretrainer(collect_in=tmp_path, loadables={"first": scale()})
        with pytest.raises(ValueError, match="first"):
            pretrainer.collect_files()

    def test_loading_before_collecting_is_refused(self, api, scale):
        """Without a `collect_in` to look into, the ValueError names loadable and cure."""
        pretrainer = api.Pretrainer(loadables={"first": scale()}, paths={"first": "a/first.ckpt"})
        with pytest.raises(ValueError, match=r"(?s)first.*collect_files"):
            pretrainer.load_collected()

    def test_what_lies_in_collect_in_needs_no_collecting(self, api, source, scale):
        """Files collected by an earlier run are loaded from there."""
        first = scale(0)
        api.Pretrainer(collect_in=source, loadables={"first": first}).load_collected()
        assert first.value == 1

    @pytest.mark.parametrize(
        ("condition", "loaded"),
        [
            (True, True),
            (False, False),
            (1, True),
            (None, False),
            (lambda: True, True),
            (lambda: False, False),
        ],
    )
    def test_conditions_decide_what_is_loaded(
        self, api, tmp_path, source, scale, condition, loaded
    ):
        """A value, or a function asked when needed; without one a loadable is loaded."""
        first, second = scale(0), scale(0)
        pretrainer = api.Pretrainer(
            collect_in=tmp_path / "collected",
            loadables={"first": first, "second": second},
            conditions={"first": condition},
        )
        assert bool(pretrainer.is_loadable("first")) is loaded
        assert pretrainer.is_loadable("second")
        paths = pretrainer.collect_files(default_source=str(source))
        assert ("first" in paths) is loaded
        pretrainer.load_collected()
        assert (first.value, second.value) == (1 if loaded else 0, 2)

    def test_custom_hooks_win_and_get_object_and_path(self, api, source, scale):
        """Signature (obj, path)."""
        calls = []
        first = scale(0)
        pretrainer = api.Pretrainer(
            loadables={"first": first},
            custom_hooks={"first": lambda obj, path: calls.append((obj, Path(path).name))},
        )
        pretrainer.collect_files(default_source=str(source))
        pretrainer.load_collected()
        assert calls == [(first, "first.ckpt")]
        assert first.value == 0

    def test_transfer_hooks_win_over_load_hooks(self, api, tmp_path):
        """A class with both is transferred; one with a loader only is loaded, mid-epoch."""
        parent = make_counter_class(api)

        @api.register_checkpoint_hooks
        class Both(parent):
            @api.mark_as_transfer
            def transfer(self, path):
                self.number = -int(Path(path).read_text())

        both, loader_only = Both(), parent()
        (tmp_path / "both.ckpt").write_text("3")
        (tmp_path / "loader_only.ckpt").write_text("4")
        pretrainer = api.Pretrainer(loadables={"both": both, "loader_only": loader_only})
        pretrainer.collect_files(default_source=str(tmp_path))
        pretrainer.load_collected()
        assert (both.number, both.end_of_epoch) == (-3, None)
        assert (loader_only.number, loader_only.end_of_epoch) == (4, False)

    def test_modules_are_transferred_not_recovered(self, api, tmp_path):
        """A model with a layer less takes what fits."""
        source = torch.nn.Linear(1, 1)
        torch.save(source.state_dict(), tmp_path / "model.ckpt")
        target = torch.nn.Linear(1, 1, bias=False)
        pretrainer = api.Pretrainer(loadables={"model": target})
        pretrainer.collect_files(default_source=str(tmp_path))
        pretrainer.load_collected()
        assert torch.equal(target.weight, source.weight)

    def test_an_object_without_any_hook_is_refused(self, api, tmp_path):
        """RuntimeError with the type."""
        (tmp_path / "plain.ckpt").write_text("1")
        pretrainer = api.Pretrainer(loadables={"plain": Plain()})
        pretrainer.collect_files(default_source=str(tmp_path))
        with pytest.raises(RuntimeError, match="Plain"):
            pretrainer.load_collected()

    def test_split_path_parts_source_and_file(self, api):
        """The last part is the file; a bare name lies in the current folder."""
        assert list(api.Pretrainer.split_path("a/b/model.ckpt")) == ["a/b", "model.ckpt"]
        source, filename = api.Pretrainer.split_path("model.ckpt")
        assert (Path(source), filename) == (Path(), "model.ckpt")
