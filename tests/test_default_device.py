"""Under `torch.set_default_device` everything of ours still lies in the memory of the processor.

On `meta` a tensor has no bytes, so whatever was made there by mistake fails or is lost, as it would
be slow or fail on a GPU.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from lightning_sbckpt import Checkpointer, average_checkpoints
from lightning_sbckpt._sharded.states import ShardedState
from lightning_sbckpt._world import collectives
from lightning_sbckpt._world.world import TorchDistributed
from lightning_sbckpt.averaging import save_average
from lightning_sbckpt.consolidation import consolidate
from lightning_sbckpt.difference import diff
from lightning_sbckpt.export import to_safetensors, to_state_dict
from lightning_sbckpt.retention import Pareto
from lightning_sbckpt.rng import capture_rng, restore_rng
from lightning_sbckpt.verify import verify

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_sbckpt"
WIDTH = 300

# Functions that draw as torch itself does, from the generator of the default device.
AS_TORCH = {"draw_seed"}
CONSTRUCTORS = {each.__name__ for each in _device_constructors()}


@pytest.fixture(params=["set_default_device", "with torch.device"])
def elsewhere(request):
    """A context in which tensors are made on `meta`, unless somebody names another device."""
    if request.param == "with torch.device":
        return lambda: torch.device("meta")
    return _Default


class _Default:
    def __enter__(self):
        torch.set_default_device("meta")

    def __exit__(self, *_):
        torch.set_default_device(None)


class Values:
    """A recoverable that holds arrays of numpy, one of them empty, and a scalar."""

    def __init__(self, fill):
        self.state = {"a": np.full(3, fill), "empty": np.zeros(0), "scalar": np.float32(fill)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def trained(seed):
    """Return a model, its optimizer after one step, and values of numpy."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, WIDTH)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "values": Values(float(seed))}


@pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
def test_what_was_saved_is_loaded(tmp_path, elsewhere, mode):
    """In every mode of saving, into live objects and into an optimizer that has no state yet."""
    saved, loaded = trained(1), trained(2)
    new = torch.optim.AdamW(loaded["model"].parameters())
    loaded["optimizer"] = new
    with elsewhere():
        with Checkpointer(tmp_path, saved, save_mode=mode) as checkpointer:
            checkpointer.save_checkpoint({"loss": torch.nn.Parameter(saved["model"].bias[:2])})
            checkpointer.wait()
        with Checkpointer(tmp_path, loaded, save_mode=mode) as checkpointer:
            found = checkpointer.recover_if_possible()
    assert found is not None
    assert found.meta["loss"].device.type == "cpu"
    assert torch.equal(saved["model"].weight, loaded["model"].weight)
    for ours, theirs in zip(
        saved["optimizer"].state.values(), loaded["optimizer"].state.values(), strict=True
    ):
        assert {value.device.type for value in theirs.values()} == {"cpu"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded["values"].state["empty"].shape == (0,)
    assert loaded["values"].state["a"].tolist() == [1.0] * 3


@pytest.fixture
def checkpoints(tmp_path):
    """A folder with two checkpoints."""
    for seed in (1, 2):
        with Checkpointer(tmp_path / "run", trained(seed)) as checkpointer:
            checkpointer.save_checkpoint({"loss": seed, "accuracy": seed}, name=str(seed))
    return tmp_path / "run"


def test_tools_read_and_make_checkpoints(checkpoints, tmp_path, elsewhere):
    """They verify, compare, average, export and rank."""
    with elsewhere():
        with Checkpointer(checkpoints) as checkpointer:
            first, second = sorted(checkpointer.list_checkpoints(), key=lambda c: c.path.name)
            averaged = average_checkpoints([first, second], "model")
            assert len(Pareto("loss", "accuracy", modes=("min", "max")).keeps([first, second])) == 2
        assert {each.status for each in verify(checkpoints)} == {"sound"}
        assert not diff(first, second).equal
        saved = save_average(checkpoints, [first, second])
        to_state_dict(first, tmp_path / "model.pt")
        to_safetensors(first, tmp_path / "model.safetensors")
    expected = (trained(1)["model"].weight + trained(2)["model"].weight) / 2
    assert torch.allclose(averaged["weight"], expected)
    assert torch.equal(
        torch.load(saved.paramfiles["model"], weights_only=True)["weight"], averaged["weight"]
    )
    assert torch.equal(torch.load(tmp_path / "model.pt")["weight"], trained(1)["model"].weight)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_pieces_are_saved_and_put_together(tmp_path, elsewhere, mode):
    """Also tensors that have no elements."""
    state = {"w": torch.rand(WIDTH, WIDTH), "none": torch.zeros(0, 3), "number": torch.tensor(2.0)}
    with elsewhere():
        with Checkpointer(tmp_path, {"m": ShardedState(state)}, save_mode=mode) as checkpointer:
            checkpointer.save_checkpoint(name="a")
            checkpointer.wait()
            (saved,) = checkpointer.list_checkpoints()
        whole = consolidate(saved, tmp_path)
    found = torch.load(whole.paramfiles["m"], weights_only=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("may_hang", [True, False])
def test_objects_go_from_rank_to_rank(tmp_path, elsewhere, monkeypatch, may_hang):
    """By torch's own collectives and by ours."""
    monkeypatch.setattr(collectives, "_MAY_HANG", may_hang)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        with elsewhere():
            assert TorchDistributed().broadcast({"a": 1}) == {"a": 1}
            assert TorchDistributed().gather({"a": 1}) == [{"a": 1}]
    finally:
        dist.destroy_process_group()


def test_random_states_are_put_back(elsewhere):
    """With what is drawn afterwards."""
    with elsewhere():
        state = capture_rng()
        first = torch.rand(3, device="cpu")
        assert restore_rng(state) == []
        assert torch.equal(first, torch.rand(3, device="cpu"))


def without_device(source):
    """Return the calls that make a tensor wherever the default device is, as they are written."""
    tree = ast.parse(source)
    allowed = {
        id(call)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in AS_TORCH
        for call in ast.walk(function)
    }
    return [
        ast.unparse(call)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in CONSTRUCTORS
        and not any(keyword.arg == "device" for keyword in call.keywords)
        and id(call) not in allowed
    ]


def test_every_new_tensor_says_where_it_lies():
    """No call of torch that makes a tensor leaves the device to a default."""
    offences = {
        str(path.relative_to(PACKAGE)): found
        for path in sorted(PACKAGE.rglob("*.py"))
        if (found := without_device(path.read_text(encoding="utf-8")))
    }
    assert offences == {}


@pytest.mark.parametrize("offence", ["torch.empty(0)", "f(torch.as_tensor(x, dtype=y))"])
def test_a_tensor_that_does_not_say_where_it_lies_is_found(offence):
    """The check above can fail."""
    assert without_device(offence)
    assert not without_device(offence.replace(")", ", device='cpu')", 1))
