"""Copies from and to devices other than the processor, without one: what is asked, in which order.

Storages in the memory of the processor stand for some on a device: only where they are said to lie is
changed. The device does what it is asked as late as it may, so bytes are wrong where nobody waits for
it. No test here shows that a real device does what it is asked.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from functools import partial

import pytest
import torch
from _in_flight import WIDTH, Everything, contents, files_of_sync_save
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format import encode, image, load_in_place, read_tensors
from lightning_sbckpt._format.image import Image
from lightning_sbckpt._io import devices as _devices
from lightning_sbckpt._io import direct_write
from lightning_sbckpt._io.devices import Part, begin_copies
from lightning_sbckpt._io.memory import Buffers
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._save import arena, stage
from lightning_sbckpt.errors import SaveError

ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    """A queue of a device."""

    def __init__(self, cuda, device, name="aside"):
        self.cuda, self.device, self.name = cuda, device, name
        self.todo = []

    def run(self):
        """Do what is queued; another thread that asks meanwhile waits until all of it is done."""
        with self.cuda.working:
            while self.todo:
                self.todo.pop(0)()

    def wait_stream(self, other):
        self.cuda.happened.append((f"{self.name} waits for {other.name}", self.device))

    def wait_event(self, event):
        self.cuda.happened.append((f"{self.name} waits", self.device))
        # At the latest now, since what is queued next may write to what is copied.
        event.stream.run()


class Event:
    """A place in a queue."""

    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        name = threading.current_thread().name
        if name != "MainThread":
            assert self.cuda.go_on.wait(60)
        self.cuda.happened.append((f"waited for by {name}", self.stream.device))
        with self.cuda.working:
            self.stream.run()
            for write in self.cuda.arriving.pop(self.stream.device, ()):
                write()


class Cuda:
    """Two devices. What they copy arrives when somebody waits for it."""

    def __init__(self):
        self.happened = []
        self.arriving = {}
        self.working = threading.RLock()
        self.capturing = False
        # Until it is set, no other thread learns that the device has done anything.
        self.go_on = threading.Event()
        self.go_on.set()
        self.current = {device: Stream(self, device, "current") for device in (ZERO, ONE)}
        self.copies = []

    @contextlib.contextmanager
    def stream(self, which):
        before, self.current[which.device] = self.current[which.device], which
        yield
        self.current[which.device] = before

    def copy(self, device, target, source):
        """Copy as late as the device may."""
        stream = self.current[device]

        def arrive(data):
            self.arriving.setdefault(device, []).append(lambda: target.copy_(data))

        # What is queued on the current stream comes before all that is queued there later.
        if stream.name == "current":
            arrive(source.clone())
        else:
            stream.todo.append(lambda: arrive(source.clone()))


class Target:
    """Memory that a device copies to."""

    def __init__(self, cuda, target):
        self.cuda, self.target = cuda, target

    def copy_(self, source, *, non_blocking):
        self.cuda.copies.append(len(source))
        if non_blocking:
            self.cuda.copy(_devices.device_of(source.untyped_storage()), self.target, source)
        else:
            self.target.copy_(source)


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for CUDA, on which everything of a tensor whose first byte is odd is device one's."""
    made = Cuda()

    def pin(memory, devices):
        if any(device.type == "cuda" for device in devices):
            made.happened.append(("pinned", len(memory)))
            return memory
        return None

    target = _devices._target
    monkeypatch.setattr(_devices, "pin", pin)
    monkeypatch.setattr(arena, "pin", pin)
    monkeypatch.setattr(_devices, "is_pinned", lambda memory: True)
    monkeypatch.setattr(_devices, "_target", lambda *where: Target(made, target(*where)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.current[device])
    monkeypatch.setattr(torch.cuda, "Stream", partial(Stream, made))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(made))
    monkeypatch.setattr(torch.cuda, "stream", made.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(
        direct_write, "_buffers", Buffers(direct_write._BUFFERS, direct_write.BLOCK)
    )
    return made


@pytest.fixture
def everything_on(monkeypatch):
    """A function that has every storage lie on the named device, as far as it is asked."""

    def pretend(name):
        device = torch.device(name)
        placed = image._placed

        def elsewhere(start, part):
            begin, end, address, part = placed(start, part)
            return begin, end, (address if isinstance(part, bytes) else 0), part

        for module in (_devices, image, read_tensors):
            monkeypatch.setattr(module, "device_of", lambda _: device)
        monkeypatch.setattr(image, "_placed", elsewhere)
        monkeypatch.setattr(load_in_place, "is_here", lambda _: False)

    return pretend


def waits(cuda):
    """Return which devices this process has waited for in the thread that trains."""
    return [device for what, device in cuda.happened if what == "waited for by MainThread"]


class TestCopiesOfSeveralDevices:
    """A copy to pinned memory is only begun when torch returns, on its own device's stream."""

    @pytest.fixture
    def parts(self, monkeypatch):
        """Large tensors of both devices and their places."""
        storages = [torch.full((2**17,), n, dtype=torch.uint8).untyped_storage() for n in range(3)]
        where = {each.data_ptr(): (ZERO, ONE)[n % 2] for n, each in enumerate(storages)}
        monkeypatch.setattr(_devices, "device_of", lambda storage: where[storage.data_ptr()])
        return [Part(each, 0, n * 2**17, (n + 1) * 2**17) for n, each in enumerate(storages)]

    def test_every_device_is_waited_for_after_all_copies_were_begun(self, cuda, parts):
        """Whichever of them is the current one."""
        out = memoryview(bytearray(3 * 2**17))
        begun = begin_copies(parts, out)
        assert waits(cuda) == []
        begun.wait()
        assert waits(cuda) == [ZERO, ONE]
        assert [out[n * 2**17] for n in range(3)] == [0, 1, 2]

    def test_no_other_device_is_touched(self, cuda, parts):
        """Waiting for a device makes a context there, of hundreds of megabytes."""
        begin_copies(parts[1:2], memoryview(bytearray(2**18))).wait()
        assert {device for _, device in cuda.happened} == {ONE}

    def test_copies_that_were_begun_are_waited_for_when_a_later_one_fails(
        self, cuda, parts, monkeypatch
    ):
        """They would go on into memory that is somebody else's by then."""
        copy = Cuda.copy

        def fail(self, device, target, source):
            if device == ONE:
                raise RuntimeError("lost")
            copy(self, device, target, source)

        monkeypatch.setattr(Cuda, "copy", fail)
        with pytest.raises(RuntimeError, match="lost"):
            begin_copies(parts, memoryview(bytearray(3 * 2**17)))
        assert waits(cuda) == [ZERO, ONE]
        assert cuda.arriving == {}


def test_a_file_names_every_device_that_it_lies_on(monkeypatch):
    """A model may be spread over several, beside what the processor has."""
    here = torch.arange(4).untyped_storage()
    parts = [(0, b"head"), (64, here), (128, Elsewhere(ONE, b"ab")), (192, Elsewhere(ZERO, b"c"))]
    assert Image(256, parts).devices == {ZERO, ONE}
    assert Image(128, parts[:2]).devices == set()


class Elsewhere:
    """A storage that is said to lie on a device."""

    def __init__(self, device, content):
        self.device, self.content = device, content

    def nbytes(self):
        return len(self.content)

    def data_ptr(self):
        return 0


@needs_torch("2.6", "torch.serialization.skip_data")
@pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "privateuseone", "cuda:1"])
def test_a_save_from_any_device_holds_the_same_bytes(tmp_path, cuda, everything_on, device, mode):
    """Only CUDA copies into pinned memory by itself; from the others copies end before torch returns."""
    everything = Everything()
    everything.change()
    everything_on(device)
    with everything.checkpointer(tmp_path / "there", save_mode=mode) as checkpointer:
        for name in "ab":
            checkpointer.save_checkpoint(name=name)
            checkpointer.wait()
    asked = {what.partition(" ")[0] for what, _ in cuda.happened}
    by_mode = {"sync": {"waited"}, "async": {"pinned", "waited"}}
    expected = by_mode.get(mode, {"pinned", "waited", "aside"})
    # Training waits there only for what has not been waited for in the background before.
    assert asked - {"current"} == (expected if "cuda" in device else set())
    expected = files_of_sync_save(tmp_path / "sync", "change")
    for name in "ab":
        assert contents(tmp_path / "there" / f"CKPT+{name}") == expected


class Large(torch.nn.Module):
    """More than a block of small and large tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for number in range(2000):
            self.register_buffer(f"small{number}", torch.rand(1 + number % 50))
        for number in range(3):
            self.register_buffer(f"large{number}", torch.rand(2**20))


@needs_torch("2.6", "torch.serialization.skip_data")
class TestManySmallTensors:
    """To begin a copy takes longer than to copy a few bytes."""

    @pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
    def test_they_are_copied_together(self, tmp_path, cuda, everything_on, mode):
        """2,000 of them in a handful of copies, and every byte is right."""
        model = Large()
        everything_on("cuda:1")
        with Checkpointer(tmp_path, {"m": model}, save_mode=mode) as checkpointer:
            checkpointer.save_checkpoint(name="a")
            checkpointer.wait()
        assert len(cuda.copies) < 20
        found = torch.load(tmp_path / "CKPT+a" / "m.ckpt", weights_only=True)
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())

    def test_where_the_device_has_no_memory_left_they_are_copied_one_by_one(
        self, tmp_path, cuda, everything_on, monkeypatch
    ):
        """A save must not fail for a few megabytes."""

        def refuse(run):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(_devices, "_put_together", refuse)
        model = Large()
        everything_on("cuda:1")
        with Checkpointer(tmp_path, {"m": model}) as checkpointer:
            checkpointer.save_checkpoint(name="a")
        found = torch.load(tmp_path / "CKPT+a" / "m.ckpt", weights_only=True)
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())

    def test_nothing_of_the_processor_between_them_is_lost(self, cuda, monkeypatch):
        """The count of steps, say, that an optimizer keeps there beside moments on the device."""
        there = [torch.full((40,), n, dtype=torch.uint8).untyped_storage() for n in (1, 3)]
        here = torch.full((8,), 2, dtype=torch.uint8).untyped_storage()
        on = {each.data_ptr() for each in there}
        placed = image._placed

        def elsewhere(start, part):
            begin, end, address, part = placed(start, part)
            return begin, end, (0 if address in on else address), part

        monkeypatch.setattr(image, "_placed", elsewhere)
        for module in (_devices, image):
            monkeypatch.setattr(module, "device_of", lambda _: ONE)
        made = Image(
            160, [(0, b"head"), (16, there[0]), (64, here), (80, there[1]), (120, b"end.")]
        )
        expected = bytearray(160)
        expected[:4], expected[120:124] = b"head", b"end."
        expected[16:56], expected[64:72], expected[80:120] = b"\1" * 40, b"\2" * 8, b"\3" * 40
        whole = bytearray(160)
        made.fill(0, memoryview(whole))
        assert whole == expected
        for start in range(0, 160, 20):
            block = bytearray(b"?" * 20)
            made.fill(start, memoryview(block))
            assert block == expected[start : start + 20]
        later = bytearray(160)
        left = made.begin(memoryview(later), hide=True)
        here[:] = 9
        left.finish()
        assert later == expected
        assert cuda.copies.count(104) == 2


@needs_torch("2.6", "torch.serialization.skip_data")
def test_a_sync_save_copies_into_pinned_buffers_that_are_kept(tmp_path, cuda, everything_on):
    """Into others torch copies by way of its own, at a fraction of the pace."""
    everything_on("cuda:1")
    with Checkpointer(tmp_path, {"m": Large()}) as checkpointer:
        for name in "ab":
            checkpointer.save_checkpoint(name=name)
    pinned = [size for what, size in cuda.happened if what == "pinned"]
    assert pinned == [direct_write._BUFFERS * direct_write.BLOCK]
    assert waits(cuda)


@needs_torch("2.6", "torch.serialization.skip_data")
class TestOverlap:
    """Copies on a stream of their own, for which nobody waits but the device."""

    def trained(self, folder, everything_on):
        """Return everything after a step, on a device, and what saves it."""
        everything = Everything()
        everything.change()
        everything_on("cuda:1")
        return everything, everything.checkpointer(folder, save_mode="overlap")

    def test_the_thread_that_trains_never_waits_for_the_device(
        self, tmp_path, cuda, everything_on, caplog
    ):
        """What the device is asked to do from the step on waits there; the bytes are the moment's."""
        expected = files_of_sync_save(tmp_path / "sync", "change")
        everything, checkpointer = self.trained(tmp_path / "overlap", everything_on)
        cuda.go_on.clear()
        checkpointer.save_checkpoint(name="a")
        everything.forward_and_backward()
        everything.optimizer.step()
        assert waits(cuda) == []
        happened = [what for what, _ in cuda.happened if "waited" not in what]
        # The model's and the optimizer's.
        assert happened[1:3] == ["aside waits for current"] * 2
        assert "current waits" in happened[3:]
        everything.note()
        cuda.go_on.set()
        checkpointer.wait()
        assert contents(tmp_path / "overlap" / "CKPT+a") == expected
        assert find_damage(tmp_path / "overlap" / "CKPT+a") == []
        assert checkpointer._saver._mode == "overlap"

    def test_a_copy_that_somebody_wrote_to_is_taken_anew(
        self, tmp_path, cuda, everything_on, caplog
    ):
        """Before the optimizer's step, on the stream of training."""
        everything, checkpointer = self.trained(tmp_path / "overlap", everything_on)
        checkpointer.save_checkpoint(name="a")
        with torch.no_grad():
            everything.model[0].weight.add_(1)
        everything.optimizer.step()
        checkpointer.wait()
        assert "were written to between the save and the optimizer's step" in caplog.text
        found = torch.load(tmp_path / "overlap" / "CKPT+a" / "model.ckpt", weights_only=True)
        again = Everything()
        again.change()
        assert torch.equal(found["0.weight"], again.model[0].weight + 1)

    def test_a_storage_that_is_given_back_meanwhile_is_noticed(
        self, tmp_path, cuda, everything_on, caplog
    ):
        """Its memory is somebody else's by then."""
        everything, checkpointer = self.trained(tmp_path / "overlap", everything_on)
        cuda.go_on.clear()
        checkpointer.save_checkpoint(name="a")
        storage = everything.model[0].weight.untyped_storage()
        size, before = storage.nbytes(), storage.data_ptr()
        storage.resize_(size + 1)
        assert storage.data_ptr() != before
        threading.Timer(0.1, cuda.go_on.set).start()
        checkpointer.wait()
        assert "were written to" in caplog.text

    def test_no_copy_hides_where_a_step_may_be_replayed_as_a_graph(
        self, tmp_path, cuda, everything_on, caplog
    ):
        """A replay waits for nothing, and raises no counter; it is said once."""
        stage._warn_of_graphs.cache_clear()
        everything, checkpointer = self.trained(tmp_path / "overlap", everything_on)
        everything.optimizer.param_groups[0]["capturable"] = True
        with caplog.at_level(logging.WARNING):
            for name in "ab":
                checkpointer.save_checkpoint(name=name)
                assert waits(cuda)
                cuda.happened.clear()
        checkpointer.wait()
        assert caplog.text.count("replayed as a CUDA graph") == 1

    def test_a_graph_that_is_captured_meanwhile_is_refused(self, tmp_path, cuda, everything_on):
        """It can't wait, and would write to what is copied whenever it is replayed."""
        everything, checkpointer = self.trained(tmp_path / "overlap", everything_on)
        cuda.go_on.clear()
        checkpointer.save_checkpoint(name="a")
        cuda.capturing = True
        with pytest.raises(SaveError, match="a CUDA graph is captured"):
            everything.optimizer.step()
        cuda.capturing = False
        cuda.go_on.set()
        checkpointer.wait()
        assert find_damage(tmp_path / "overlap" / "CKPT+a") == []


class TestLoading:
    """What is on a device gets its values where it lies."""

    @pytest.fixture
    def pair(self, tmp_path):
        """A model and its optimizer, saved; and others with other values."""
        made = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)])
            optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1 * seed))
            model(torch.rand(2, WIDTH)).sum().backward()
            optimizer.step()
            made.append({"m": model, "o": optimizer})
        with Checkpointer(tmp_path, made[0]) as checkpointer:
            checkpointer.save_checkpoint(name="a")
        return made

    def tensors(self, objects):
        """Return every tensor of a model and its optimizer."""
        moments = [value for each in objects["o"].state.values() for value in each.values()]
        groups = [group["lr"] for group in objects["o"].param_groups]
        return [*objects["m"].state_dict().values(), *moments, *groups]

    def test_every_tensor_keeps_its_address(self, tmp_path, cuda, everything_on, pair, monkeypatch):
        """A step that was captured goes on with it; there is no second copy of the moments."""
        saved, live = pair
        before = [(each.data_ptr(), each._version) for each in self.tensors(live)]
        # Of a few hundred kB each, so that several are needed for a file.
        monkeypatch.setattr(read_tensors, "_halves", Buffers(2, 2**18))
        everything_on("cuda:1")
        made = []
        monkeypatch.setattr(load_in_place, "read_tensors", read_noting(made))
        with Checkpointer(tmp_path, live) as checkpointer:
            checkpointer.recover_if_possible()
        after = [(each.data_ptr(), each._version) for each in self.tensors(live)]
        assert [address for address, _ in after] == [address for address, _ in before]
        assert all(new > old for (_, new), (_, old) in zip(after, before, strict=True))
        assert all(map(torch.equal, self.tensors(saved), self.tensors(live)))
        # But for the learning rate nothing was read into memory of its own.
        assert [each.size for each in made] == [()]

    def test_a_buffer_is_read_into_again_only_when_the_device_has_copied_from_it(
        self, tmp_path, cuda, everything_on, pair, monkeypatch
    ):
        """One is read into while the device copies from the other."""
        happened = []

        class Sent:
            def __init__(self, number):
                self.number = number

            def wait(self):
                happened.append(("copied from", self.number))

        halves = Buffers(2, 2**18)
        monkeypatch.setattr(read_tensors, "_halves", halves)
        read, send = read_tensors.read_into, read_tensors.begin_sending
        address = {}

        def reading(path, identity, wanted):
            wanted = list(wanted)
            if (
                wanted
                and address.setdefault("least", wanted[0][0])
                <= wanted[0][0]
                < address["least"] + 2**19
            ):
                happened.append(("read into", (wanted[0][0] - address["least"]) // 2**18))
            read(path, identity, wanted)

        def sending(targets):
            send(targets)
            happened.append(("begun", happened[-1][1]))
            return Sent(happened[-1][1])

        everything_on("cuda:1")
        monkeypatch.setattr(read_tensors, "read_into", reading)
        monkeypatch.setattr(read_tensors, "begin_sending", sending)
        with Checkpointer(tmp_path, {"m": pair[1]["m"]}) as checkpointer:
            checkpointer.recover_if_possible()
        assert happened[:8] == [
            ("read into", 0),
            ("begun", 0),
            ("read into", 1),
            ("begun", 1),
            ("copied from", 0),
            ("read into", 0),
            ("begun", 0),
            ("copied from", 1),
        ]
        # At the end both, before the buffers are somebody else's.
        assert {number for what, number in happened[-2:] if what == "copied from"} == {0, 1}

    def test_one_learning_rate_of_several_groups_becomes_several(self, tmp_path):
        """A tensor that groups share can't have two values."""

        def groups(*rates):
            parts = [torch.nn.Parameter(torch.ones(2)) for _ in rates]
            return torch.optim.SGD(
                [{"params": [p], "lr": r} for p, r in zip(parts, rates, strict=True)]
            )

        saved = groups(torch.tensor(0.1), torch.tensor(0.2))
        shared = torch.tensor(0.5)
        live = groups(shared, shared)
        with Checkpointer(tmp_path, {"o": saved}) as checkpointer:
            checkpointer.save_checkpoint()
        with Checkpointer(tmp_path, {"o": live}) as checkpointer:
            checkpointer.recover_if_possible()
        assert [float(group["lr"]) for group in live.param_groups] == pytest.approx([0.1, 0.2])
        assert live.param_groups[0]["lr"] is shared


def read_noting(made):
    """Return `read_tensors` that notes what it reads."""
    read = read_tensors.read_tensors

    def noting(path, identity, wanted, **options):
        made.extend(wanted)
        return read(path, identity, wanted, **options)

    return noting


class Quantized(torch.Tensor):
    """A tensor made of others, as torchao's are."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values):
        self.values_ = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


@pytest.mark.parametrize("known", [True, False])
def test_whether_tensors_of_other_classes_are_plain_is_asked_without_their_bytes(
    monkeypatch, known
):
    """They lie on a GPU; each would be written and read back, at every level of the state."""
    monkeypatch.setattr(encode, "torch_bytes", lambda value: pytest.fail("its bytes were written"))
    tensor = Quantized(torch.ones(3, 4))
    scope = torch.serialization.safe_globals([Quantized]) if known else contextlib.nullcontext()
    with scope:
        encoded, pickled = encode.encode({"model": {"weight": tensor, "bias": torch.ones(2)}})
    assert (encoded["model"]["weight"] is tensor) == known
    assert list(pickled) == ([] if known else [("model", "weight")])


def test_memory_that_the_system_cannot_hand_to_the_disk_is_written_through_the_cache(
    tmp_path, monkeypatch
):
    """As some drivers' is: `O_DIRECT` gives EFAULT there."""
    refused = []
    write = os.pwrite

    def refuse(descriptor, data, start):
        if len(data) > 2**20 and not refused:
            refused.append(start)
            raise OSError(errno.EFAULT, "Bad address")
        return write(descriptor, data, start)

    monkeypatch.setattr(os, "pwrite", refuse)
    monkeypatch.setattr(direct_write._Writing, "_is_direct", lambda self: True)
    model = torch.nn.Linear(WIDTH * 2, WIDTH * 2)
    with Checkpointer(tmp_path, {"m": model}) as checkpointer:
        checkpointer.save_checkpoint(name="a")
    assert refused
    found = torch.load(tmp_path / "CKPT+a" / "m.ckpt", weights_only=True)
    assert torch.equal(found["weight"], model.weight)
