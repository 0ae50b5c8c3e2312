"""Weights that some ranks refuse: no rank waits for another, and none goes on with other weights."""

from __future__ import annotations

import pytest
from _ranks import Model, make, run

SECONDS = 40


class Refuses(Model):
    """Raises when some of the ranks load, at the resume or at the end of a fit."""

    def __init__(self, when: str, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.when, self.ranks = when, ranks

    def on_load_checkpoint(self, checkpoint):
        when = "fit end" if self.trainer.fit_loop.epoch_progress.current.completed else "resume"
        if when == self.when and self.global_rank in self.ranks:
            raise KeyError("vocabulary")


def fit(folder, rank, when, ranks, epochs):
    trainer, module, _, loaders = make(
        folder / "checkpoints",
        rank,
        module=lambda: Refuses(when, ranks),
        trainer={"max_epochs": epochs},
    )
    trainer.fit(module, **loaders)


@pytest.mark.sample(1)
@pytest.mark.parametrize("refusing", [0, 1])
def test_a_rank_that_refuses_its_weights_leaves_none_waiting(tmp_path, refusing):
    """At a resume."""
    assert run(fit, tmp_path, "never", (), 1).codes == [0, 0]
    ended = run(fit, tmp_path, "resume", (refusing,), 2, alone=True, timeout=SECONDS)
    assert ended.seconds < SECONDS + 5 and all(ended.codes), ended.outputs
    assert "KeyError: 'vocabulary'" in ended.outputs[refusing]


def test_best_weights_that_one_rank_refuses_are_no_rank_s(tmp_path):
    """The ranks would hold different models; the error says which can't load them."""
    ended = run(fit, tmp_path, "fit end", (1,), 1, alone=True, timeout=SECONDS)
    assert ended.seconds < SECONDS + 5 and all(ended.codes), ended.outputs
    assert all("fit on some ranks and not on others (1)" in output for output in ended.outputs)


def test_best_weights_that_every_rank_refuses_leave_the_last_ones(tmp_path):
    """With one warning, from rank zero."""
    ended = run(fit, tmp_path, "fit end", (0, 1), 1, alone=True, timeout=SECONDS)
    assert ended.codes == [0, 0], ended.outputs
    said = ["so the last weights stay: KeyError" in output for output in ended.outputs]
    assert said == [True, False]
