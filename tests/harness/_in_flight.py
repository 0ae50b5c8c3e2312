"""A state with a bit of everything, and disks on which a save in the background can be held up."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import torch
from torchmetrics import MeanMetric

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage

WIDTH = 300
"""A weight of so many rows and columns is large: 360 kB, of which 256 are enough."""


class Odd:
    """What only pickle can hold."""

    def __init__(self, number: int) -> None:
        self.number = number


class Various:
    """Containers, numpy, and what only pickle can hold, all changed in place."""

    def __init__(self) -> None:
        self.array = np.zeros(5)
        self.words = ["zero"]
        self.nested = {"list": [0], "tensor": torch.zeros(3)}
        self.odd = Odd(0)

    def state_dict(self) -> dict[str, object]:
        """Return the live objects, not copies."""
        return {"a": self.array, "w": self.words, "n": self.nested, "odd": self.odd}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take them over."""
        self.array, self.words = state["a"], state["w"]
        self.nested, self.odd = state["n"], state["odd"]


class Noted:
    """What a hook of its own writes."""

    def __init__(self) -> None:
        self.number = 0


class Everything:
    """Recoverables of every kind, in a state that a seed decides."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, 1)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.metric = MeanMetric()
        self.generator = torch.Generator().manual_seed(seed)
        self.various = Various()
        self.noted = Noted()

    def forward_and_backward(self) -> None:
        """Do what comes before an optimizer's step."""
        x = torch.randn(4, WIDTH, generator=self.generator)
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        self.metric.update(loss.detach())

    def change(self) -> None:
        """Train a step, and change everything else in place."""
        self.forward_and_backward()
        self.optimizer.step()
        self.scheduler.step()
        self.note()

    def note(self) -> None:
        """Change what no optimizer changes."""
        self.various.array += 1
        self.various.words[0] += "!"
        self.various.words.append("more")
        self.various.nested["list"][0] += 1
        self.various.nested["tensor"] += 1
        self.various.odd.number += 1
        self.noted.number += 1

    def checkpointer(self, folder: Path, **options: object) -> Checkpointer:
        """Return a checkpointer of it all."""
        checkpointer = Checkpointer(folder, trust_pickle=True, **options)
        names = ("model", "optimizer", "scheduler", "metric", "generator", "various")
        checkpointer.add_recoverables({name: getattr(self, name) for name in names})
        checkpointer.add_recoverable(
            "noted",
            self.noted,
            lambda noted, path, end_of_epoch: setattr(noted, "number", int(path.read_text())),
            lambda noted, path: path.write_text(str(noted.number)) and None,
        )
        return checkpointer


def contents(folder: Path) -> dict[str, object]:
    """Return what is in every recoverable's files in a checkpoint; of a torch file, its records."""
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.ckpt"))}
    return {name: _records(data) if data[:2] == b"PK" else data for name, data in files.items()}


def _records(data: bytes) -> dict[str, bytes]:
    # Not by reading them with zipfile, which looks at checksums that torch doesn't.
    found = {}
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        name, extra = struct.unpack_from("<26xHH", data, info.header_offset)
        start = info.header_offset + 30 + name + extra
        # Torch's word for which file this is depends on the file it was first written as.
        if not info.filename.endswith("serialization_id"):
            found[info.filename] = data[start : start + info.file_size]
    return found


def files_of_sync_save(folder: Path, *changes: str) -> dict[str, object]:
    """Return what a save that nothing hurries writes of the state after some changes."""
    everything = Everything()
    for change in changes:
        getattr(everything, change)()
    with everything.checkpointer(folder) as checkpointer:
        return contents(checkpointer.save_checkpoint(name="expected").path)


class HeldUp(LocalStorage):
    """A disk on which every save in the background waits until it may go on.

    Attributes:
        arrived: Set when one waits.
        go_on: Set it to let them.
        failure: The error from then on of a disk that can only remove, if any.
    """

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.go_on = threading.Event()
        self.failure: tuple[int, str] | None = None

    def before(self, operation: str, path: Path, target: Path | None = None) -> None:
        """Wait in the background's thread."""
        if threading.current_thread().name == "sbckpt-writer":
            self.arrived.set()
            assert self.go_on.wait(60)
            if self.failure is not None and not operation.startswith("remove"):
                raise OSError(*self.failure)
