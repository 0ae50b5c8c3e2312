"""Copies by several threads are the bytes that were there, and the hashes are theirs."""

from __future__ import annotations

import random
import threading

import pytest
import torch
import xxhash

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format.image import LARGE, Image
from lightning_sbckpt._layout.manifest import find_damage, read_manifest
from lightning_sbckpt._save import hashing_copy
from lightning_sbckpt._save.arena import Arena
from lightning_sbckpt._save.hashing_copy import copy_hashed
from lightning_sbckpt._save.late_copy import LateCopy

BLOCK = hashing_copy._BLOCK


class Content:
    """Random bytes that note which thread asked for which block."""

    def __init__(self, size, seed=0):
        self.size = size
        self.content = random.Random(seed).randbytes(size)
        self.asked = {}

    def fill(self, start, out):
        assert start not in self.asked
        self.asked[start] = threading.current_thread().name
        self.before(start)
        out[:] = self.content[start : start + len(out)]

    def before(self, start):
        pass


@pytest.fixture(params=[1, 2, 4])
def threads(request, monkeypatch):
    monkeypatch.setattr(hashing_copy, "useful_threads", lambda: request.param)
    monkeypatch.setattr(hashing_copy, "_WORTH_THREADS", 0)
    return request.param


def copied(sources):
    memory = [memoryview(bytearray(source.size)) for source in sources]
    checksums = copy_hashed(list(zip(sources, memory, strict=True)))
    return memory, checksums


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [BLOCK],
        [BLOCK - 1, BLOCK + 1],
        [7 * BLOCK + 5],
        [9 * BLOCK, 0, BLOCK // 2, 3 * BLOCK + 1, 1],
    ],
    ids=str,
)
def test_every_byte_is_copied_once_and_hashed(threads, sizes):
    """Files of no byte, of one, of a block and around it, one alone and several."""
    sources = [Content(size, seed) for seed, size in enumerate(sizes)]
    memory, checksums = copied(sources)
    assert [bytes(each) for each in memory] == [source.content for source in sources]
    assert checksums == [xxhash.xxh3_128_hexdigest(source.content) for source in sources]
    assert [len(source.asked) for source in sources] == [-(-size // BLOCK) for size in sizes]


def test_who_has_no_file_left_copies_for_the_others(monkeypatch):
    """Block after block in turn with the owner, so that what is hashed next was copied just now."""
    monkeypatch.setattr(hashing_copy, "useful_threads", lambda: 2)

    # Each block waits for one of the other thread, so none gets ahead, however busy the machine is.
    other = threading.Barrier(2, timeout=60)

    class InStep(Content):
        def before(self, start):
            other.wait()

    sources = [InStep(40 * BLOCK), Content(BLOCK, 1)]
    memory, checksums = copied(sources)
    assert bytes(memory[0]) == sources[0].content
    assert checksums[0] == xxhash.xxh3_128_hexdigest(sources[0].content)
    by_owner = [start for start, name in sources[0].asked.items() if name == sources[0].asked[0]]
    by_helper = sorted(sources[0].asked.keys() - set(by_owner))
    assert min(len(by_helper), len(by_owner)) > 10
    for turn, start in enumerate(sources[0].asked):
        assert abs(turn - start // BLOCK) <= 1


def test_small_states_start_no_thread(monkeypatch):
    """It would take longer than the copy."""
    monkeypatch.setattr(hashing_copy, "useful_threads", lambda: 4)
    source = Content(3 * BLOCK)
    copied([source])
    assert set(source.asked.values()) == {threading.current_thread().name}


@pytest.mark.parametrize("bad", [0, 5 * BLOCK, 11 * BLOCK])
def test_what_goes_wrong_in_a_thread_is_raised_and_nobody_waits(threads, bad):
    """At the first block, in the middle, and at the last one, whoever takes it."""

    class Broken(Content):
        def before(self, start):
            if start == bad:
                raise MemoryError("no such page")

    running = threading.active_count()
    with pytest.raises(MemoryError, match="no such page"):
        copied([Broken(12 * BLOCK), Content(6 * BLOCK, 1)])
    assert threading.active_count() == running


def test_where_no_thread_can_be_started_the_caller_copies(monkeypatch):
    """As when the interpreter is exiting."""
    monkeypatch.setattr(hashing_copy, "useful_threads", lambda: 4)

    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(hashing_copy.Thread, "start", refuse)
    source = Content(20 * BLOCK)
    (memory,), (checksum,) = copied([source])
    assert bytes(memory) == source.content
    assert checksum == xxhash.xxh3_128_hexdigest(source.content)


@pytest.mark.parametrize("late", [False, True])
def test_the_hash_of_a_copy_is_that_of_the_file(late):
    """Of a file whose large storages come at once or later, between small ones, at its end."""
    generator = torch.Generator().manual_seed(3)
    sizes = [10, LARGE * 5 + 3, 100, LARGE, 7, LARGE * 2]
    tensors = [
        torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator) for size in sizes
    ]
    place, parts = 64, [(0, b"the head of the file")]
    for tensor in tensors:
        parts.append((place, tensor.untyped_storage()))
        place += tensor.nbytes + 30
    images = {"a": Image(place, parts), "b": Image(place - 30, parts), "c": Image(20, parts[:1])}
    hideable = images if late else ()
    frozen, left = Arena().take(images, hideable)
    assert bool(left) == late
    if late:
        assert [file.checksum for file in frozen.values()] == [None] * 3
        parts = [part for each in left for part in each.addresses()]
        LateCopy(parts, tensors, frozen.values()).wait()
    for name, image in images.items():
        expected = bytearray(image.size)
        image.fill(0, memoryview(expected))
        assert bytes(frozen[name].memory[: image.size]) == expected
        assert frozen[name].checksum == xxhash.xxh3_128_hexdigest(expected)


@pytest.mark.parametrize("mode", ["async", "overlap"])
def test_the_manifest_says_the_hash_of_what_is_on_the_disk(tmp_path, mode):
    """Of states that differ from save to save, and from file to file."""
    models = {
        name: torch.nn.Linear(size, size) for name, size in [("a", 900), ("b", 2500), ("c", 3)]
    }
    with Checkpointer(tmp_path, models, save_mode=mode) as checkpointer:
        for _ in range(3):
            for model in models.values():
                torch.nn.init.normal_(model.weight)
            checkpointer.save_checkpoint()
            checkpointer.before_update()
    found = checkpointer.list_checkpoints()
    assert len(found) == 3
    for ckpt in found:
        assert find_damage(ckpt.path) == []
        files = read_manifest(ckpt.path).files
        for name, path in ckpt.paramfiles.items():
            assert files[f"{name}.ckpt"].xxh3_128 == xxhash.xxh3_128_hexdigest(path.read_bytes())
