"""Buffers that no `state_dict` has: memory banks, queues, moving centers."""

from __future__ import annotations

import pytest
import torch
from _runs import At, Steps, fit, newest, raise_at
from torch import nn

from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.buffers import NonPersistentBuffers
from lightning_sbckpt.plugin.state.exact import NONPERSISTENT, parts_of_ranks
from lightning_sbckpt.plugin.state.per_rank import state_of_rank


class StoppedError(RuntimeError):
    """Ends a fit where a kill would."""


class Bank(nn.Module):
    """A memory bank that is made at its first use, as lightly's is."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("bank", torch.empty(0), persistent=False)
        self.register_buffer("place", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, value):
        if self.bank.numel() == 0:
            self.bank = torch.zeros(self.width)
        self.bank[self.place] = value
        self.place[0] = (self.place + 1) % len(self.bank)
        return self.bank.sum()


class Contrastive(Steps):
    """Its weights depend on a queue, a center and a bank."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.criterion = Bank(width)
        self.register_buffer("queue", torch.zeros(4), persistent=False)
        self.register_buffer("center", torch.zeros(()), persistent=False)
        self.register_buffer("mask", torch.ones(9, 9).tril(), persistent=False)

    def training_step(self, batch, batch_idx):
        weight = self.weight.detach()
        self.queue.data = torch.cat([self.queue[1:], weight])
        self.center.data.copy_(0.9 * self.center + 0.1 * weight.sum())
        scale = 1 + self.queue.sum() + self.center + self.criterion(weight)
        return self.weight.sum() * scale.clamp(-2, 2)


def buffers_of(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of a run that was stopped in its second epoch, and one never stopped."""
    folder = tmp_path_factory.mktemp("buffers")
    whole = fit(folder / "whole", module=Contrastive(), restore_best=False)
    stop = raise_at("on_train_batch_start", 7, StoppedError())
    options = {"every_n_train_steps": 1, "restore_best": False}
    with pytest.raises(StoppedError):
        fit(folder / "stopped", module=Contrastive(), callbacks=[stop], **options)
    return folder / "stopped", whole


def test_buffers_that_training_changes_go_on_as_they_were(runs):
    """In place, through `.data`, or put in another's place: a bank, its pointer, a queue, a center."""
    folder, whole = runs
    resumed = fit(folder, module=Contrastive(), restore_best=False)
    assert torch.equal(resumed.module.weight, whole.module.weight)
    found = buffers_of(resumed.module)
    assert all(torch.equal(found[name], value) for name, value in buffers_of(whole.module).items())
    assert "nonpersistent" in resumed.callback.resume_report.restored


def test_buffers_that_never_change_are_not_saved(runs):
    """A mask or a table costs nothing; what is saved opens with torch alone."""
    folder, _ = runs
    path = newest(folder).paramfiles["nonpersistent"]
    (state,) = torch.load(path, weights_only=True)["ranks"]
    assert set(state) == {"queue", "center", "criterion.bank", "criterion.place"}


def test_a_module_without_such_buffers_has_no_such_file(tmp_path):
    """Nor one whose buffers never change."""
    fit(tmp_path, trainer={"max_epochs": 1})
    assert "nonpersistent" not in newest(tmp_path).paramfiles


def test_restored_buffers_are_saved_again(runs, tmp_path):
    """A run that is stopped twice, the second time before a buffer changed anew, loses nothing."""
    module = Contrastive()
    module.queue.fill_(1.0)
    first = NonPersistentBuffers(module)
    module.queue.fill_(2.0)
    saved = first.state()
    resumed = Contrastive()
    second = NonPersistentBuffers(resumed)
    assert _private.buffers.restore(resumed, saved) == []
    assert second.state()["queue"]["value"].tolist() == [2.0] * 4


def test_a_bank_of_another_size_begins_anew_and_is_named():
    """The rest is restored, and the resume goes on."""
    module = Contrastive()
    before = NonPersistentBuffers(module)
    module.queue.fill_(2.0)
    module.center.fill_(3.0)
    saved = before.state()
    other = Contrastive()
    other.queue = torch.zeros(8)
    (problem,) = _private.buffers.restore(other, saved)
    assert "'queue'" in problem and "(4,)" in problem and "(8,)" in problem
    assert other.queue.tolist() == [0.0] * 8
    assert other.center == 3.0


def test_a_buffer_that_is_gone_is_named():
    """By its name, among what was skipped."""
    module = Contrastive()
    before = NonPersistentBuffers(module)
    module.queue.fill_(2.0)
    (problem,) = _private.buffers.restore(Steps(), before.state())
    assert "'queue'" in problem


@pytest.mark.parametrize("equal", [True, False])
def test_buffers_that_ranks_have_in_common_are_kept_once(equal):
    """Those that differ are kept for each rank."""

    class World:
        size = 2

        def __init__(self, rank):
            self.rank = rank
            self.sent = []

        def gather(self, obj):
            self.sent.append(obj)
            return None if self.rank else [*self.others.pop(0), obj][::-1]

        def broadcast(self, obj):
            return equal

    def state(number):
        return {NONPERSISTENT: {"queue": {"value": torch.full((2,), number), "made": [2]}}}

    second = World(1)
    parts_of_ranks(state(1.0 if equal else 2.0), second)
    first = World(0)
    first.others = [[sent] for sent in second.sent]
    part = parts_of_ranks(state(1.0), first)[NONPERSISTENT].take()
    own = [state_of_rank(part, rank) for rank in (0, 1)]
    assert own[0]["queue"]["value"].tolist() == [1.0, 1.0]
    assert (own[1] is None) == equal


def test_a_resume_may_leave_them_out(runs):
    """As everything else, by `skip`."""
    folder, _ = runs
    seen = {}

    def look():
        seen.update(buffers_of(resumed_module))

    resumed_module = Contrastive()
    look_at = At("on_train_batch_start", 1, look)
    fit(
        folder,
        module=resumed_module,
        callbacks=[look_at],
        skip=["nonpersistent"],
        resume=True,
        trainer={"max_epochs": 4},
    )
    assert not seen["queue"].any()
