"""What differs between two checkpoints: meta, files, and every tensor in them."""

from __future__ import annotations

from lightning_sbckpt.difference.compare import Difference, diff
from lightning_sbckpt.difference.files import FileDifference, FormChange, TensorChange, ValueChange

__all__ = ["Difference", "FileDifference", "FormChange", "TensorChange", "ValueChange", "diff"]
