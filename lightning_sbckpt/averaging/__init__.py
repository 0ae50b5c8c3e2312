"""Averages of checkpoints, taken one file at a time.

Averaging the parameters of the last or best checkpoints of a run often generalizes better than
any one of them (Izmailov et al., 2018, https://arxiv.org/abs/1803.05407).
"""

from __future__ import annotations

from lightning_sbckpt.averaging.average import (
    average_checkpoints,
    average_state_dicts,
    save_average,
)

__all__ = ["average_checkpoints", "average_state_dicts", "save_average"]
