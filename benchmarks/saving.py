"""How long a durable, synchronous save takes, against the raw write of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.disk import RawWrite, scratch
from benchmarks.measure import Section, Settings, Table, size_label
from benchmarks.peer import saver
from benchmarks.peers import SYNC, opened
from benchmarks.states import State

RAW = "raw unbuffered write"

# Beyond this size a round takes long; these are enough to see what grows.
_BIG = 1000
_FOR_BIG = ("lightning-sbckpt, sync", "torch.save + fsync", "Lightning + fsync")


def run(settings: Settings) -> Section:
    """Measure."""
    table = Table("Time until the checkpoint is durable", "s", RAW)
    section = Section(
        "save",
        "Durable synchronous save",
        "The state is a model and its Adam moments, some 500 tensors. Between two saves every "
        "tensor is changed; the folder is emptied, and that is flushed, outside the measured time. "
        f"The reference, *{RAW}*, writes as many bytes in blocks of 16 MB with `O_DIRECT` from "
        "memory that is ready, in huge pages where the system has them, and flushes.",
        {"save": table},
    )
    for size in settings.sizes:
        chosen = {name: make for name, make in SYNC.items() if size < _BIG or name in _FOR_BIG}
        state = State(size)
        with (
            scratch(settings.folder / "save") as folder,
            opened(chosen, state, folder, section.failures) as peers,
        ):
            raw = RawWrite(folder / "raw", state.bytes())
            subjects: dict[str, Callable[[], float]] = {RAW: raw.seconds}
            subjects |= {name: saver(peer, state, wait=False) for name, peer in peers.items()}
            table.add(
                size_label(size),
                settings.interleave(
                    subjects,
                    15 if size <= 100 else 7,
                    seconds=settings.seconds_for(size),
                    warmup=0 if size >= _BIG else 1,
                    failures=section.failures,
                ),
            )
            if not raw.is_direct:
                table.notes.append("The filesystem refuses O_DIRECT: the raw write is buffered.")
        print(f"  save: {size_label(size)} done", flush=True)
    return section
