"""The real SpeechBrain and this package read each other's folders, and have the same signatures."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import lightning_sbckpt


def build(api, seed=0):
    """A model, Adam, a scheduler and an epoch counter, as a recipe has them."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
        "epochs": api.EpochCounter(6),
    }


def train_epoch(objects):
    """Train one epoch on four fixed examples and return the loss."""
    inputs = torch.arange(12.0).reshape(4, 3) / 12
    objects["optimizer"].zero_grad()
    loss = (objects["model"](inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
    loss.backward()
    objects["optimizer"].step()
    objects["scheduler"].step()
    objects["plateau"].step(loss.item())
    return loss.item()


def write_run(api, folder, epochs=3):
    """Train and save after each epoch; return the objects and the checkpoints."""
    objects = build(api)
    checkpointer = api.Checkpointer(folder, objects)
    ckpts = []
    for epoch in objects["epochs"]:
        loss = train_epoch(objects)
        # The middle epoch is best, so that best and newest differ.
        meta = {"loss": abs(epoch - 2) + loss / 1000, "acc": -abs(epoch - 2), "note": "über"}
        ckpts.append(checkpointer.save_checkpoint(meta=meta))
        if epoch == epochs:
            break
    return objects, ckpts


def states(objects):
    """The state of every object, as something to compare."""
    found = {name: obj.state_dict() for name, obj in objects.items() if name != "epochs"}
    return {**found, "epochs": objects["epochs"].current}


def assert_same_states(found, expected):
    """Compare nested states bit for bit, types included."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same_states(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same_states(left, right)
    else:
        assert found == expected


@pytest.fixture(params=["ours read by SpeechBrain", "SpeechBrain's read by ours"])
def writer_and_reader(request, original_api):
    """Which package writes and which one reads."""
    if request.param.startswith("ours"):
        return lightning_sbckpt, original_api
    return original_api, lightning_sbckpt


class TestFolders:
    """What one writes, the other lists, ranks and loads."""

    def test_listed_alike(self, writer_and_reader, tmp_path):
        """The same paths, meta and paramfiles."""
        writer, reader = writer_and_reader
        _, ckpts = write_run(writer, tmp_path)
        listed = reader.Checkpointer(tmp_path).list_checkpoints()
        assert {c.path: (c.meta, c.paramfiles) for c in listed} == {
            c.path: (c.meta, c.paramfiles) for c in ckpts
        }
        assert len(listed) == 3

    def test_ranked_alike(self, writer_and_reader, tmp_path):
        """Newest, lowest, highest, most important, filtered."""
        writer, reader = writer_and_reader
        _, (first, second, third) = write_run(writer, tmp_path)
        finder = reader.Checkpointer(tmp_path)
        assert finder.find_checkpoint() == third
        assert finder.find_checkpoint(min_key="loss") == second
        assert finder.find_checkpoint(max_key="acc") == second
        assert finder.find_checkpoint(importance_key=lambda c: -c.meta["unixtime"]) == first
        assert finder.find_checkpoint(ckpt_predicate=lambda c: c.meta["loss"] < 0.5) == second
        assert finder.find_checkpoints() == [third, second, first]

    def test_loaded_bit_for_bit(self, writer_and_reader, tmp_path):
        """Model, Adam, schedulers and epoch counter hold the state that was saved."""
        writer, reader = writer_and_reader
        saved, ckpts = write_run(writer, tmp_path)
        objects = build(reader, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # What older releases say of the way in which SpeechBrain loads.
            warnings.filterwarnings("ignore", "You are using `torch.load`")
            assert reader.Checkpointer(tmp_path, objects).recover_if_possible() == ckpts[-1]
        assert_same_states(states(objects), states(saved))

    def test_training_goes_on_as_if_nothing_had_happened(self, writer_and_reader, tmp_path):
        """Epochs four to six give the same losses in the other package."""
        writer, reader = writer_and_reader
        saved, _ = write_run(writer, tmp_path)
        expected = [train_epoch(saved) for _ in saved["epochs"]]
        objects = build(reader, seed=1)
        reader.Checkpointer(tmp_path, objects).recover_if_possible()
        assert [train_epoch(objects) for _ in objects["epochs"]] == expected
        assert len(expected) == 3

    def test_the_best_is_loaded_and_transferred(self, writer_and_reader, tmp_path):
        """By a key, as at the end of training; and into a model with a layer less."""
        writer, reader = writer_and_reader
        _, (_, second, _) = write_run(writer, tmp_path)
        objects = build(reader, seed=1)
        finder = reader.Checkpointer(tmp_path, objects)
        assert finder.recover_if_possible(min_key="loss") == second
        assert objects["epochs"].current == 2
        smaller = torch.nn.Sequential(torch.nn.Linear(3, 4))
        reader.torch_parameter_transfer(smaller, second.paramfiles["model"])
        assert torch.equal(smaller[0].weight, objects["model"][0].weight)

    def test_a_folder_written_by_both_is_one_run(self, writer_and_reader, tmp_path):
        """One starts, the other goes on and cleans up, the first goes on again."""
        first, second = writer_and_reader
        write_run(first, tmp_path)
        objects = build(second, seed=1)
        checkpointer = second.Checkpointer(tmp_path, objects)
        checkpointer.recover_if_possible()
        assert next(objects["epochs"]) == 4
        checkpointer.save_and_keep_only(
            meta={"loss": 9.0 + train_epoch(objects)}, min_keys=["loss"], importance_keys=[]
        )
        back = build(first, seed=2)
        checkpointer = first.Checkpointer(tmp_path, back)
        assert len(checkpointer.list_checkpoints()) == 2
        assert checkpointer.recover_if_possible().meta["loss"] > 9.0
        assert_same_states(states(back), states(objects))

    def test_an_unfinished_epoch_is_repeated(self, writer_and_reader, tmp_path):
        """`end-of-epoch` means the same to both."""
        writer, reader = writer_and_reader
        counter = writer.EpochCounter(3)
        next(counter)
        next(counter)
        writer.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint(end_of_epoch=False)
        again = reader.EpochCounter(3)
        reader.Checkpointer(tmp_path, {"epochs": again}).recover_if_possible()
        assert list(again) == [2, 3]

    def test_averages_are_the_same(self, writer_and_reader, tmp_path):
        """Both average the weights of each other's checkpoints to the same numbers."""
        writer, reader = writer_and_reader
        _, ckpts = write_run(writer, tmp_path)
        by_writer = writer.average_checkpoints(ckpts, "model")
        by_reader = reader.average_checkpoints(
            reader.Checkpointer(tmp_path).find_checkpoints(), "model"
        )
        for key in ("0.weight", "1.running_mean", "3.bias"):
            assert torch.allclose(by_writer[key], by_reader[key])


class TestSpeechBrainsFolders:
    """A folder without a manifest has nothing to be compared with: unverified, not damaged."""

    def test_they_are_loaded_without_a_word_of_damage(self, original_api, tmp_path, caplog):
        """Neither a warning nor a step back to an older one."""
        _, ckpts = write_run(original_api, tmp_path)
        assert not list(tmp_path.rglob("MANIFEST*"))
        checkpointer = lightning_sbckpt.Checkpointer(tmp_path, build(lightning_sbckpt, seed=1))
        assert checkpointer.recover_if_possible() == ckpts[-1]
        checkpointer.load_checkpoint(ckpts[0])
        assert [rec for rec in caplog.records if rec.levelname in ("WARNING", "ERROR")] == []

    def test_the_stopper_of_speechbrain_is_read(self, original_api, tmp_path):
        """It saves only the epoch's number, since its own hooks are never registered there."""
        counter = original_api.EpochCounterWithStopper(9, 2, 0, "min")
        next(counter)
        next(counter)
        original_api.Checkpointer(tmp_path, {"epochs": counter}).save_checkpoint()
        again = lightning_sbckpt.EpochCounterWithStopper(9, 2, 0, "min")
        lightning_sbckpt.Checkpointer(tmp_path, {"epochs": again}).recover_if_possible()
        assert again.current == 2

    @pytest.mark.parametrize(
        "make",
        [
            lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
                optimizer, 0.1, 1.0, cycle_momentum=False
            ),
            lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
            torch.optim.lr_scheduler.LinearLR,
            lambda optimizer: torch.amp.GradScaler("cpu", init_scale=64.0),
        ],
        ids=["CyclicLR", "CosineAnnealingLR", "LinearLR", "GradScaler"],
    )
    def test_other_torch_objects_cross_over_too(self, writer_and_reader, tmp_path, make):
        """Written by one, loaded by the other, and the other way round."""
        writer, reader = writer_and_reader

        def build_one():
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
            return optimizer, make(optimizer)

        optimizer, obj = build_one()
        if hasattr(obj, "get_last_lr"):
            for _ in range(3):
                optimizer.step()
                obj.step()
        else:
            obj.load_state_dict({**obj.state_dict(), "scale": 7.0})
        writer.Checkpointer(tmp_path, {"optimizer": optimizer, "obj": obj}).save_checkpoint()
        other_optimizer, other = build_one()
        saved = {"optimizer": other_optimizer, "obj": other}
        reader.Checkpointer(tmp_path, saved).recover_if_possible()
        if hasattr(obj, "get_last_lr"):
            assert other.last_epoch == 3
            for _ in range(2):
                for opt, scheduler in ((optimizer, obj), (other_optimizer, other)):
                    opt.step()
                    scheduler.step()
            assert other.get_last_lr() == obj.get_last_lr()
        else:
            assert other.state_dict() == obj.state_dict()


PLAIN_TORCH_LOAD = """
import json, sys
sys.modules["lightning_sbckpt"] = None  # Whatever needs it cannot have it.
sys.modules["speechbrain"] = None
import torch

opened = {}
for path in sys.argv[1:]:
    state = torch.load(path, weights_only=True)
    opened[path] = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
print(json.dumps(opened))
"""


class TestPlainTorch:
    """A paramfile of a torch object needs nothing of ours."""

    def test_every_torch_paramfile_opens_with_weights_only(self, tmp_path):
        """In another process, where this package cannot be imported."""
        objects = build(lightning_sbckpt)
        del objects["epochs"]
        optimizer = objects["optimizer"]
        objects |= {
            "sgd": torch.optim.SGD(objects["model"].parameters(), lr=0.1, momentum=0.9),
            "cyclic": torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, cycle_momentum=False),
            "cosine": torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
            "onecycle": torch.optim.lr_scheduler.OneCycleLR(
                torch.optim.SGD(objects["model"].parameters(), lr=0.1, momentum=0.9),
                max_lr=0.1,
                total_steps=10,
            ),
            "sequential": torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [
                    torch.optim.lr_scheduler.LinearLR(optimizer),
                    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
                ],
                milestones=[2],
            ),
            "scaler": torch.amp.GradScaler("cpu"),
            "generator": torch.Generator().manual_seed(1),
        }
        train_epoch(objects)
        ckpt = lightning_sbckpt.Checkpointer(tmp_path / "run", objects).save_checkpoint()
        paths = [str(path) for path in ckpt.paramfiles.values()]
        assert {path.stem for path in ckpt.path.glob("*.ckpt")} == set(objects)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_TORCH_LOAD, *paths],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        opened = json.loads(done.stdout)
        assert set(opened) == set(paths)
        assert opened[str(ckpt.paramfiles["model"])] == sorted(objects["model"].state_dict())
        assert opened[str(ckpt.paramfiles["optimizer"])] == ["param_groups", "state"]


def public_callables(api, names):
    """Yield (label, callable) for every public function, class and method among the names."""
    for name in names:
        obj = getattr(api, name)
        if isinstance(obj, dict) or not callable(obj) or name == "Checkpoint":
            continue
        yield name, obj
        if inspect.isclass(obj):
            for attribute in sorted(set(dir(obj)) - set(dir(object))):
                member = getattr(obj, attribute)
                if not attribute.startswith("_") and callable(member):
                    yield f"{name}.{attribute}", member


class TestSignatures:
    """A script written for SpeechBrain can make every call it makes today."""

    def test_every_public_callable_is_there(self, original_api):
        """Classes, functions and all public methods, by the same name."""
        names = list(vars(original_api))
        ours = dict(public_callables(lightning_sbckpt, names))
        theirs = dict(public_callables(original_api, names))
        assert set(theirs) <= set(ours)
        assert len(theirs) > 30

    def test_every_parameter_is_there_and_can_be_passed_as_before(self, original_api):
        """Same names; positional ones in the same order; optional ones still optional."""
        names = list(vars(original_api))
        ours = dict(public_callables(lightning_sbckpt, names))
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        wrong = []
        for label, original in public_callables(original_api, names):
            theirs = inspect.signature(original).parameters
            found = inspect.signature(ours[label]).parameters
            expected = list(theirs)
            ordered = [name for name in expected if theirs[name].kind is positional]
            if [name for name in found if found[name].kind is positional][
                : len(ordered)
            ] != ordered:
                wrong.append(f"{label}: {ordered} became {list(found)}")
            for name in expected:
                if name not in found:
                    wrong.append(f"{label} has no {name}")
                elif (
                    theirs[name].default is not inspect.Parameter.empty
                    and found[name].default is inspect.Parameter.empty
                ):
                    wrong.append(f"{label} demands {name}")
            for name, parameter in found.items():
                required = parameter.default is inspect.Parameter.empty
                if (
                    name not in theirs
                    and required
                    and parameter.kind
                    not in (
                        inspect.Parameter.VAR_POSITIONAL,
                        inspect.Parameter.VAR_KEYWORD,
                    )
                ):
                    wrong.append(f"{label} demands {name}, which is new")
        assert wrong == []

    def test_plain_defaults_have_the_same_values(self, original_api):
        """Numbers, flags, names and None; a mutable default may become an immutable one."""
        names = list(vars(original_api))
        ours = dict(public_callables(lightning_sbckpt, names))
        for label, original in public_callables(original_api, names):
            found = inspect.signature(ours[label]).parameters
            for name, parameter in inspect.signature(original).parameters.items():
                if isinstance(parameter.default, (bool, int, float, str)):
                    assert found[name].default == parameter.default, f"{label}({name})"
