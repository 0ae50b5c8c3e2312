"""Where one loader is, and how another one gets there.

A place is described by how the iterator came to be (the random states when it was made, and at its
first draw) and how many batches it gave. What is done with that depends on the loader:

=========  =====================================================================================
order      a map-style `DataLoader` without workers: the order is drawn again, no sample is loaded
workers    a map-style `DataLoader` with workers: the same, and each worker is started with the
           random states that its predecessor had after its last delivered batch
own        a loader that carries its state itself: it is given back, nothing is skipped
replay     anything else (iterable datasets above all): the batches are loaded again, dropped
=========  =====================================================================================
"""

# The iterators of a DataLoader have no public interface.
# ruff: noqa: SLF001

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

from lightning_sbckpt._streams import to_bytes, to_tensors
from lightning_sbckpt.plugin._iteration import (
    Closed,
    Iteration,
    Place,
    carries_data,
    draw_seed,
    is_plain,
    is_torchdata,
    turn_to,
)
from lightning_sbckpt.plugin._loader_handle import LoaderHandle
from lightning_sbckpt.plugin._loader_workers import (
    WorkerState,
)
from lightning_sbckpt.plugin._sampling import (
    DrawLog,
    Order,
    is_well_known,
    set_samplers,
)
from lightning_sbckpt.plugin.epoch_position import EpochPosition
from lightning_sbckpt.rng import (
    isolated_rng,
)
from lightning_sbckpt.typing import Stateful

__all__ = ["LoaderPosition"]


class LoaderPosition(LoaderHandle):
    """The position of one loader: begins its iterations, describes them, takes them up again."""

    # -- iterating ------------------------------------------------------------------------------

    def begin(self, *, keeps_last: bool) -> Iteration:
        """Begin a fresh iteration.

        Args:
            keeps_last: whether the batch that is given last may have to be given again.
        """
        created = self._moment()
        if self._start is not None and self._born is not None:
            # The workers of an earlier run go on; starting them must not touch the present.
            with isolated_rng():
                self._set(self._born)
                inner, _ = self._open(self._start)
            self._set_generators(created["generators"])
            self._start, made = None, False
        else:
            inner, made = self._open({})
            if made:
                self._born = created
        place = {"created": created, "born": self._born, "made": made, "first": None}
        self.latest = self._iteration(inner, place, keeps_last=keeps_last)
        return self.latest

    def let_go(self) -> None:
        """Forget the present iteration, and with it the last reference to its workers."""
        self.latest = None
        if self._sampler is not None:
            self._sampler.latest = None

    def state(self, prefetched: int) -> dict[str, object]:
        """Return where the loader is, as plain values."""
        now = self._moment(rng=False)
        place = None if self.latest is None else self._place(self.latest, prefetched)
        return {"loader": self.describe(), "now": now, "iteration": place}

    def restore_now(self, state: Mapping[str, Any]) -> None:
        """Give the loader's own generators and counters the states they had."""
        now = state["now"]
        never_iterated = state["iteration"] is None
        set_samplers(self.loader, now["samplers"], self._baseline, own_states=never_iterated)
        self.notes += self._set_generators(now["generators"])

    # -- going on -------------------------------------------------------------------------------

    def resume(self, state: Mapping[str, Any], *, keeps_last: bool) -> Iteration:
        """Return an iterator that gives the batch after the last one that was trained on."""
        place: Place = state["iteration"]
        with self._as_if_nothing_happened():
            self._compare(state["loader"])
            place = self._as_batches_are_now(state["loader"], place)
            mode = self._mode()
            if mode == "own" and "own" in place:
                iteration = self._resume_own(place, keeps_last=keeps_last)
            elif mode == "map" and place["mode"] in ("order", "workers"):
                iteration = self._resume_map(place, keeps_last=keeps_last)
            else:
                iteration = self._resume_replay(place, keeps_last=keeps_last)
        if place["ended"]:
            iteration.inner, iteration.ended = iter(()), True
        self.latest = iteration
        return iteration

    def prepare_epoch(self, state: Mapping[str, Any]) -> None:
        """Bring the loader to where its next, fresh iteration begins as it would have."""
        place: Place | None = state["iteration"]
        if place is None:
            return
        loader, mode = self.loader, self._mode()
        same_workers = state["loader"]["num_workers"] == self.describe()["num_workers"]
        with self._as_if_nothing_happened():
            self._compare(state["loader"])
            if mode == "own" and "own" in place:
                own = copy.deepcopy(place["own"])
                if is_torchdata(loader):
                    # A finished one would begin the next epoch here already.
                    own["_iterator_finished"] = False
                    self._resume_own({**place, "own": own, "prefetched": 0}, keeps_last=False)
                else:
                    loader.load_state_dict(own)
            elif self._persists() and place["born"] and same_workers:
                if mode == "map":
                    # Its workers stay, and what they were doing at the end of the epoch, too.
                    self._resume_map({**place, "prefetched": 0}, keeps_last=False)
                else:
                    self._born = place["born"]
                    self._start = _worker_states(place["workers"])
                    if not place["ended"] and state["loader"]["length"] != place["yielded"]:
                        self.notes.append(
                            "its workers persist and had begun batches beyond the end of the "
                            "epoch, which are not known; use persistent_workers=False"
                        )
            elif mode == "map" and place["created"]["samplers"]["states"]:
                order, went_on = self._rebuild_order(place)
                if went_on:
                    # Many act on a loaded state when the first index is asked for.
                    next(order, None)
        self.latest = None

    # -- describing -----------------------------------------------------------------------------

    def _place(self, iteration: Iteration, prefetched: int) -> Place:
        prefetched = min(prefetched, iteration.yielded)
        count = iteration.yielded - prefetched
        inner = iteration.inner
        mode = self._mode()
        if mode == "map":
            mode = "workers" if self._has_workers() else "order"
        place: Place = {
            **iteration.place,
            "mode": mode,
            "yielded": count,
            "prefetched": prefetched,
            "ended": iteration.ended,
            "log": None if iteration.log is None else iteration.log.state(),
            "order": _order_state(iteration.order, count),
            "workers": to_tensors(getattr(inner, "worker_states", {})),
            "begun": to_tensors(getattr(inner, "begun_states", {})),
        }
        undo = getattr(inner, "before_last", None)
        if prefetched and undo is not None:
            worker, before = undo
            place["workers"].pop(worker, None)
            if before is not None:
                place["workers"][worker] = to_tensors(before)
        own_before = place.pop("own_before", None)
        if not prefetched:
            place.pop("before_last", None)
        if mode == "own":
            own = copy.deepcopy(self.loader.state_dict())
            if is_torchdata(self.loader) and not carries_data(own):
                place["mode"] = "replay"
            elif prefetched and not is_plain(iteration.last):
                place["own"] = own_before
            else:
                place.update(self._own_place(own, iteration, prefetched))
        return place

    def _own_place(self, own: object, iteration: Iteration, prefetched: int) -> Place:
        if not prefetched:
            return {"own": own}
        # Its state is that after the prefetched batch, so the batch is kept with it. The workers'
        # states have to be of the same moment.
        states = to_tensors(getattr(iteration.inner, "worker_states", {}))
        return {"own": own, "batch": iteration.last, "workers": states}

    # -- getting there --------------------------------------------------------------------------

    def _as_batches_are_now(self, saved: Mapping[str, Any], place: Place) -> Place:
        """Return a place with as many batches as there are samples in those that were given."""
        here = self.describe()
        then = EpochPosition(place["yielded"], saved["batch_size"], 1, saved["length"])
        count = then.batches_with(
            batch_size=cast("int | None", here["batch_size"]),
            ranks=1,
            length=cast("int | None", here["length"]),
        )
        return place if count == place["yielded"] else {**place, "yielded": count}

    def _resume_map(self, place: Place, *, keeps_last: bool) -> Iteration:
        loader, count = self.loader, place["yielded"]
        order, _ = self._rebuild_order(place)
        after_skip = self._moment()
        self._set(place["born"] or place["created"])
        states = _worker_states(place["workers"])
        if set(states) - set(range(loader.num_workers)):
            states = {}
        index_sampler = loader._index_sampler
        inner: Any
        inner, _ = self._open(states, gate=Closed(index_sampler))
        watched = self._sampler
        if watched is not None and isinstance(order, Order):
            watched.latest = order
        inner._index_sampler = index_sampler if watched is None else watched
        inner._sampler_iter = order
        inner._num_yielded = count
        if hasattr(inner, "_sampler_iter_yielded"):
            inner._sampler_iter_yielded = count
        self._set(after_skip)
        self._born = place["born"]
        if loader.num_workers:
            # Batch k is the work of worker k % n, as it was: its number and seed stay the same.
            turn_to(inner, count % loader.num_workers)
            for _ in range(self._ahead()):
                inner._try_put_index()
        fresh = {key: place[key] for key in ("created", "born", "made", "first")}
        iteration = self._iteration(inner, fresh, keeps_last=keeps_last)
        iteration.yielded = count
        if place["prefetched"]:
            if not loader.num_workers and "before_last" in place:
                self._set(place["before_last"])
            fresh["before_last"] = place.get("before_last")
            iteration.ready.append(next(inner))
        self.notes.append(f"{count} batches skipped by index, none loaded")
        return iteration

    def _rebuild_order(self, place: Place) -> tuple[Iterator[object], bool]:
        """Draw the order again as far as it was used.

        Returns:
            The iterator over the indices, and whether it went on from the sampler's own state.
        """
        loader, count, saved = self.loader, place["yielded"], place["order"]
        sampler = loader._index_sampler
        self._set(place["created"], samplers=True)
        if place["mode"] == "workers" and place["made"]:
            # Its iterator asks the sampler twice when it is made, and draws its seed in between.
            iter(sampler)
            draw_seed(loader)
        order: Iterator[object]
        if is_well_known(sampler):
            order = iter(sampler)
            if place["mode"] == "order" and place["first"]:
                self._set(place["first"])
            skipped = sum(1 for _ in islice(order, count))
            if skipped < count:
                self.notes.append(f"it has only {skipped} batches now, and {count} had been given")
            return order, False
        log = DrawLog()
        order = watched = Order(sampler, log=log, remember=self._ahead() + 3)
        if place["mode"] == "order":
            draw_seed(loader)
        if saved is not None:
            log.load(saved["log"])
            watched.replays_until = saved["drawn"] if place["mode"] == "workers" else count
        for _ in islice(order, count):
            pass
        log.resumed()
        return order, saved is not None and self._check_order(watched, place)

    def _check_order(self, order: Order, place: Place) -> bool:
        saved, count = place["order"], place["yielded"]
        told = {number: value for number, value in saved["tail"].items() if number < count}
        drawn = order.fingerprints()
        kind = type(order.sampler).__name__
        if order.drawn == count and all(drawn.get(n, value) == value for n, value in told.items()):
            if not saved["log"]["is_complete"]:
                self.notes.append(
                    f"its {kind} draws random numbers at every index, more often than is kept; its "
                    "order may differ: give it state_dict and load_state_dict"
                )
            return False
        if saved["own"]:
            order.goes_on_from(saved["own"], count)
            return True
        self.notes.append(
            f"its {kind} gave other indices than before: it is not seeded from the global random "
            "state or from a generator that it holds; seed it, or give it state_dict and "
            "load_state_dict"
        )
        return False

    def _resume_replay(self, place: Place, *, keeps_last: bool) -> Iteration:
        states: dict[int, WorkerState] = {}
        if self._has_workers() and not place["made"] and place["born"]:
            self._set(place["born"])
            # A worker that has delivered nothing yet in this epoch has not told how it began it;
            # where it ended the one before is the same, unless it drew after its last batch.
            states = _worker_states({**place["workers"], **place["begun"]})
            if not place["begun"]:
                self.notes.append(
                    "its workers persist over epochs and their random states at the beginning of "
                    "this one are not known; use persistent_workers=False"
                )
        else:
            self._set(place["created"], samplers=True)
        if isinstance(self.loader, Stateful) and is_torchdata(self.loader):
            self.loader.load_state_dict({})
        inner, _ = self._open(states)
        fresh = {key: place[key] for key in ("created", "born", "made", "first")}
        self._born = place["born"]
        iteration = self._iteration(inner, fresh, keeps_last=keeps_last)
        count, prefetched = place["yielded"], place["prefetched"]
        log = iteration.log
        if log is not None and place["log"]:
            log.load(place["log"])
            if not log.is_complete:
                self.notes.append(
                    "its dataset draws from random streams that training draws from, too, more "
                    "often than is kept; give it a generator of its own"
                )
        loaded = 0
        for number in range(count + prefetched):
            if log is not None:
                log.apply(number)
            try:
                batch = next(inner)
            except StopIteration:
                self.notes.append(f"it has only {number} batches now, and {count} had been given")
                break
            loaded += number < count
            if number >= count:
                iteration.ready.append(batch)
        if log is not None:
            log.resumed()
        iteration.yielded = loaded
        self.notes.append(f"{loaded} batches loaded again and dropped")
        return iteration

    def _resume_own(self, place: Place, *, keeps_last: bool) -> Iteration:
        loader, prefetched = self.loader, place["prefetched"]
        loader.load_state_dict(copy.deepcopy(place["own"]))
        self._set(place["born"] or place["created"])
        inner, _ = self._open(_worker_states(place["workers"]))
        fresh = {key: place[key] for key in ("created", "born", "made", "first")}
        self._born = place["born"]
        iteration = self._iteration(inner, fresh, keeps_last=keeps_last)
        iteration.yielded = place["yielded"]
        if prefetched:
            if "batch" in place:
                iteration.ready.append(place["batch"])
            else:
                self._set(place["before_last"])
                iteration.ready.append(next(inner))
        self.notes.append(f"it went on from its own state, at batch {place['yielded']}")
        return iteration


def _order_state(order: Order | None, count: int) -> Place | None:
    if order is None:
        return None
    return {
        "drawn": order.drawn,
        "log": order.log.state(),
        "tail": order.fingerprints(),
        "own": order.state_at(count),
    }


def _worker_states(states: Mapping[int, Any]) -> dict[int, WorkerState]:
    found = to_bytes(dict(states))
    assert isinstance(found, dict)
    return found
