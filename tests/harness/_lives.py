"""Records and events for timelines, and a run that was killed, resumed, pruned and pinned."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lightning_sbckpt import Checkpoint, Checkpointer
from lightning_sbckpt.retention import Best, Newest


def record(name: str, time: float, **meta) -> Checkpoint:
    return Checkpoint(Path("run") / name, {"unixtime": time, "end-of-epoch": True, **meta}, {})


def saved(name: str, time: float, lineage=None, **meta) -> dict:
    meta = {"unixtime": time, "end-of-epoch": True, **meta}
    return {
        "event": "saved",
        "time": time + 0.5,
        "name": name,
        "meta": meta,
        "lineage": lineage or {},
        "bytes": 1000,
        "seconds": 0.25,
    }


def removed(name: str, time: float, reason: str = "older than the newest 1") -> dict:
    return {"event": "removed", "time": time, "name": name, "reason": reason}


def rules(*texts: str, time: float = 0.0) -> dict:
    return {"event": "rules", "time": time, "rules": list(texts)}


LOSSES = [0.9, 0.7, math.nan, 0.5, 0.6, 0.3, 0.4, 0.45]


def small_run(root: Path) -> Checkpointer:
    """Write eight checkpoints to a folder; the run is started again after the fourth."""
    for part in (LOSSES[:4], LOSSES[4:]):
        checkpointer = Checkpointer(root, {"model": torch.nn.Linear(2, 2)})
        resumed = checkpointer.recover_if_possible()
        step = resumed.meta["global_step"] if resumed else 0
        checkpointer.lineage["run"] = "1234abcd"
        for loss in part:
            step += 100
            meta = {"global_step": step, "epoch": step // 200, "loss": loss, "acc": 1 - loss}
            checkpointer.save_checkpoint(meta, name=f"step{step}")
            if step == 200:
                checkpointer.pin(root / "CKPT+step200", "in the paper")
            checkpointer.apply_retention([Best("loss", 2), Newest(1)])
        checkpointer.save_checkpoint({"global_step": step, "ephemeral": True}, name=f"halt{step}")
        checkpointer.close()
    return checkpointer
