"""Ranks that Lightning forks or spawns hand back to the process that called `fit` what it asks of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from _ranks import checkpoints, make, run

FORK_AND_SPAWN = ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)]


def fit_in_workers(folder: Path, rank: int, strategy: str, epochs: int) -> None:
    """Fit in workers, and write down what the parent's callback says then."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(name)
    trainer, module, callback, loaders = make(
        f"{folder}/{{default_root_dir}}",
        trainer={"strategy": strategy, "max_epochs": epochs, "default_root_dir": "checkpoints"},
        num_to_keep=9,
    )
    for loader in loaders.values():
        # Its rank is not known here: both train on the same.
        loader.sampler.rank = 0
    trainer.fit(module, **loaders)
    report = callback.resume_report
    told = {
        "folder": str(callback.dirpath),
        "best": callback.best_model_path,
        "last": callback.last_model_path,
        "score": float(callback.best_model_score),
        "scores": {path: float(value) for path, value in callback.best_k_models.items()},
        "now": float(callback.current_score),
        "report": None if report is None else str(report),
        "step": None if report is None else report.meta["global_step"],
        "metrics": sorted(trainer.callback_metrics),
    }
    (folder / "parent.json").write_text(json.dumps(told))


@pytest.mark.parametrize("strategy", FORK_AND_SPAWN)
def test_the_parent_ends_with_what_rank_zero_knows_of_the_run(tmp_path, strategy):
    """The newest and the best, their scores, and, of the run that resumed, the report."""
    for epochs in (2, 3):
        ended = run(fit_in_workers, tmp_path, strategy, epochs, size=1, timeout=120)
        assert ended.codes == [0], ended.outputs
        told = json.loads((tmp_path / "parent.json").read_text())
        found = checkpoints(tmp_path)
        losses = {str(ckpt.path): ckpt.meta["val_loss"] for ckpt in found}
        assert told["folder"] == str(tmp_path / "checkpoints")
        assert told["last"] == str(found[-1].path)
        assert told["now"] == pytest.approx(losses[told["last"]])
        assert told["best"] == min(losses, key=losses.get)
        assert told["score"] == pytest.approx(losses[told["best"]])
        assert told["scores"] == {path: pytest.approx(loss) for path, loss in losses.items()}
        # Lightning's own are still handed back.
        assert {"val_loss", "train_mean"} <= set(told["metrics"])
        if epochs == 2:
            assert told["report"] is None
            before = found[-1]
    assert f"resuming from {before.path}" in told["report"]
    assert "restored: loops; lr_scheduler; model; optimizer" in told["report"]
    assert "skipped:  nothing" in told["report"]
    assert told["step"] == before.meta["global_step"]
