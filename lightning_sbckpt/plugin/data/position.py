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

A replay begins with the state that the objects of the data had when the iterator was made: those
that offer one are given it, and counters are set back. It is checked by its first batch. An
iterable that holds an iterator goes on where it was, and no one can put an iterator back: then
all batches since the fit began are loaded again.
"""

# The iterators of a DataLoader have no public interface.
# ruff: noqa: SLF001

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast
from weakref import ref

from torch.utils.data import DataLoader

from lightning_sbckpt.plugin.data.epoch_position import EpochPosition
from lightning_sbckpt.plugin.data.handle import LoaderHandle
from lightning_sbckpt.plugin.data.iteration import (
    Closed,
    Iteration,
    Place,
    carries_data,
    draw_seed,
    forget_given_place,
    is_plain,
    is_torchdata,
    mark_of,
    started_apart,
    turn_to,
)
from lightning_sbckpt.plugin.data.objects import Baseline
from lightning_sbckpt.plugin.data.sampling import (
    DrawLog,
    Order,
    is_well_known,
    set_samplers,
)
from lightning_sbckpt.plugin.data.workers import (
    WorkerState,
)
from lightning_sbckpt.rng import (
    isolated_rng,
)
from lightning_sbckpt.rng.streams import to_bytes, to_tensors
from lightning_sbckpt.rng.walk import is_opaque
from lightning_sbckpt.typing import Stateful

__all__ = ["LoaderPosition"]

# Each takes about 10 kB of a checkpoint.
_MOST_ROUNDS = 1000


class LoaderPosition:
    """The position of one loader: begins its iterations, describes them, takes them up again.

    Args:
        loader: Any that can be iterated.
        baseline: What the objects of the data were like when the fit began.

    Attributes:
        handle: The loader, and what is to be known of it.
    """

    def __init__(self, loader: Any, baseline: Baseline) -> None:
        self.handle = LoaderHandle(loader, baseline)
        self._born: Place | None = None
        self._start: dict[int, WorkerState] | None = None
        self._rounds: list[Place] = []
        self._lost_rounds = False
        self._resumed_own = False
        self._was_given_states = False

    # -- iterating ------------------------------------------------------------------------------

    def begin(self, *, keeps_last: bool) -> Iteration:
        """Begin a fresh iteration.

        Args:
            keeps_last: whether the batch that is given last may have to be given again.
        """
        if self._resumed_own:
            forget_given_place(self.handle.loader)
            self._resumed_own = False
        self.handle.data.look()
        created = self.handle.moment()
        self._note_round()
        if self._start is not None and self._born is not None:
            # The workers of an earlier run go on; starting them must not touch the present.
            with isolated_rng():
                self.handle.set_moment(self._born)
                inner, _ = self.handle.new_iterator(self._start)
            self.handle.set_generators(created["generators"])
            self._start, made = None, False
        else:
            inner, made = self.handle.new_iterator({})
            if made:
                self._born = created
        place = {"created": created, "born": self._born, "made": made, "first": None}
        self.handle.latest = self.handle.iterate(inner, place, keeps_last=keeps_last)
        self.handle.watch_beginning(self.handle.latest)
        if self._was_given_states:
            # A state of the end of an epoch may mean that nothing is left to give.
            self.handle.latest.if_empty = _weakly_fresh(ref(self), created)
            self._was_given_states = False
        return self.handle.latest

    def goes_on(self) -> list[str]:
        """Return the iterators that a new iteration goes on with, by name."""
        if is_opaque(self.handle.loader):
            return [type(self.handle.loader).__name__]
        return list(self.handle.data.iterators())

    def can_replay(self) -> bool:
        """Return whether what goes on where it was can be brought there by iterating anew."""
        return (
            self.handle.mode() == "replay"
            and not self.handle.has_workers()
            and not self._lost_rounds
        )

    def begins_anew(self) -> bool:
        """Return whether the iterators of the data are in use over epochs at all."""
        # Workers that don't persist get copies for each epoch, as of before the first.
        return not self.handle.has_workers() or self.handle.persists()

    def untold(self) -> list[str]:
        """Return what changes as the data is iterated and can't be saved, here and in workers."""
        return list(dict.fromkeys([*self.handle.data.untold, *self._told_by_workers("untold")]))

    def refused(self) -> list[str]:
        """Return what workers could not be given back, a half sentence each."""
        return list(dict.fromkeys(self._told_by_workers("refused")))

    def _told_by_workers(self, what: str) -> list[str]:
        states = getattr(getattr(self.handle.latest, "inner", None), "worker_states", {})
        return [told for state in states.values() for told in state.get(what, ())]

    def let_go(self) -> None:
        """Forget the present iteration, and with it the last reference to its workers."""
        self.handle.latest = None
        if self.handle.sampler is not None:
            self.handle.sampler.latest = None

    def state(self, prefetched: int) -> dict[str, object]:
        """Return where the loader is, as plain values."""
        now = self.handle.moment(rng=False)
        place = None if self.handle.latest is None else self._place(self.handle.latest, prefetched)
        return {"loader": self.handle.describe(), "now": now, "iteration": place}

    def restore_now(self, state: Mapping[str, Any]) -> None:
        """Give the loader's own generators and counters the states they had."""
        now = state["now"]
        never_iterated = state["iteration"] is None
        set_samplers(
            self.handle.loader, now["samplers"], self.handle.baseline, own_states=never_iterated
        )
        if "data" in now:
            self.handle.notes += self.handle.data.set(now["data"])
            self._was_given_states = bool(now["data"].get("states"))
        self.handle.notes += self.handle.set_generators(now["generators"])

    # -- going on -------------------------------------------------------------------------------

    def resume(self, state: Mapping[str, Any], *, keeps_last: bool) -> Iteration:
        """Return an iterator that gives the batch after the last one that was trained on."""
        place: Place = state["iteration"]
        with self.handle.as_if_nothing_happened():
            self.handle.compare(state["loader"])
            place = self._as_batches_are_now(state["loader"], place)
            mode = self.handle.mode()
            if mode == "own" and "own" in place:
                iteration = self._resume_own(place, keeps_last=keeps_last)
            elif mode == "map" and place["mode"] in ("order", "workers"):
                iteration = self._resume_map(place, keeps_last=keeps_last)
            else:
                iteration = self._resume_replay(place, keeps_last=keeps_last)
        if place["ended"]:
            iteration.inner, iteration.ended = iter(()), True
        self.handle.latest = iteration
        self._was_given_states = False
        return iteration

    def prepare_epoch(self, state: Mapping[str, Any]) -> None:
        """Bring the loader to where its next, fresh iteration begins as it would have."""
        place: Place | None = state["iteration"]
        if place is None:
            return
        loader, mode = self.handle.loader, self.handle.mode()
        same_workers = state["loader"]["num_workers"] == self.handle.describe()["num_workers"]
        with self.handle.as_if_nothing_happened():
            self.handle.compare(state["loader"])
            if mode == "own" and "own" in place:
                own = copy.deepcopy(place["own"])
                if is_torchdata(loader):
                    # A finished one would begin the next epoch here already.
                    own["_iterator_finished"] = False
                    self._resume_own({**place, "own": own, "prefetched": 0}, keeps_last=False)
                else:
                    loader.load_state_dict(own)
                    self._resumed_own = self.handle.is_position = True
                    if not place["ended"] and place["yielded"] != state["loader"]["length"]:
                        self.handle.notes.append(
                            "its last epoch was cut, and it was given its state of then: whether it "
                            "goes on from there or begins anew is up to it"
                        )
            elif mode != "map" and self._must_replay(place):
                self._replay_epoch(place)
            elif self.handle.persists() and place["born"] and same_workers:
                if mode == "map":
                    # Its workers stay, and what they were doing at the end of the epoch, too.
                    self._resume_map({**place, "prefetched": 0}, keeps_last=False)
                else:
                    self._born = place["born"]
                    self._start = _worker_states(place["workers"])
                    if not place["ended"] and state["loader"]["length"] != place["yielded"]:
                        self.handle.notes.append(
                            "its workers persist and had begun batches beyond the end of the "
                            "epoch, which are not known; use persistent_workers=False"
                        )
            elif mode == "map" and place["created"]["samplers"]["states"]:
                order, went_on = self._rebuild_order(place)
                if went_on:
                    # Many act on a loaded state when the first index is asked for.
                    next(order, None)
        self.handle.latest = None

    def begin_fresh(self, created: Place) -> Iterator[object]:
        """Iterate as if no state had been given, under the random states of the beginning."""
        self.handle.data.set_fresh_states()
        self.handle.set_moment(created)
        return iter(self.handle.loader)

    # -- iterating a second time ----------------------------------------------------------------

    def _note_round(self) -> None:
        """Keep what a replay of all epochs needs of the last one, if there would have to be one."""
        if not self.goes_on() or self.handle.has_workers() or self.handle.mode() == "map":
            self._rounds = []
        elif self.handle.latest is not None:
            self._rounds.append(self._place(self.handle.latest, 0))
            self._rounds[-1].pop("rounds", None)
            if len(self._rounds) > _MOST_ROUNDS:
                self._rounds, self._lost_rounds = [], True

    def _must_replay(self, place: Place) -> bool:
        """Return whether the next epoch can only be reached by replaying the last one."""
        if self.handle.has_workers():
            # A persistent worker's dataset may have counted on after its last batch.
            told = [*place["workers"].values(), *place["begun"].values()]
            return (
                self.handle.persists() and place["ended"] and any("data" in each for each in told)
            )
        if "rounds" in place:
            return True
        # Whoever stopped within an epoch may begin the next one there, or anew.
        states = place["created"].get("data", {}).get("states")
        return bool(states) and not place["ended"] and place["yielded"] > 0

    def _replay_epoch(self, place: Place) -> None:
        drawn = place["yielded"] + place["prefetched"]
        iteration = self._resume_replay({**place, "yielded": drawn, "prefetched": 0})
        if place["ended"]:
            next(iteration.inner, None)
        self._was_given_states = False
        if "rounds" in place:
            self._rounds.append({k: v for k, v in place.items() if k != "rounds"})

    # -- describing -----------------------------------------------------------------------------

    def _place(self, iteration: Iteration, prefetched: int) -> Place:
        # Where one of several loaders has come to its end, the batch was of the others.
        prefetched = 0 if iteration.ended else min(prefetched, iteration.yielded)
        count = iteration.yielded - prefetched
        inner = iteration.inner
        mode = self.handle.mode()
        if mode == "map":
            mode = "workers" if self.handle.has_workers() else "order"
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
        if "rng" in place["created"] and self._rounds_matter(mode):
            place["rounds"] = self._rounds
        own_before = place.pop("own_before", None)
        place.pop("own_first", None)
        if not prefetched:
            place.pop("before_last", None)
        if mode == "own":
            own = copy.deepcopy(self.handle.loader.state_dict())
            if (is_torchdata(self.handle.loader) and not carries_data(own)) or (
                self.handle.is_custom() and not _is_position(iteration)
            ):
                place["mode"] = "replay"
            elif prefetched and (self.handle.is_custom() or not is_plain(iteration.last)):
                place["own"] = own_before
            else:
                place.update(self._own_place(own, iteration, prefetched))
        return place

    def _rounds_matter(self, mode: str) -> bool:
        return mode == "replay" and not self.handle.has_workers() and bool(self.goes_on())

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
        here = self.handle.describe()
        then = EpochPosition(place["yielded"], saved["batch_size"], 1, saved["length"])
        count = then.batches_with(
            batch_size=cast("int | None", here["batch_size"]),
            ranks=1,
            length=cast("int | None", here["length"]),
        )
        return place if count == place["yielded"] else {**place, "yielded": count}

    def _resume_map(self, place: Place, *, keeps_last: bool) -> Iteration:
        loader, count = self.handle.loader, place["yielded"]
        order, _ = self._rebuild_order(place)
        after_skip = self.handle.moment()
        self.handle.set_moment(place["born"] or place["created"])
        states = _worker_states(place["workers"])
        if set(states) - set(range(loader.num_workers)):
            states = {}
        index_sampler = loader._index_sampler
        inner: Any
        inner, _ = self.handle.new_iterator(states, gate=Closed(index_sampler))
        watched = self.handle.sampler
        if watched is not None and isinstance(order, Order):
            watched.latest = order
        inner._index_sampler = index_sampler if watched is None else watched
        inner._sampler_iter = order
        inner._num_yielded = count
        if hasattr(inner, "_sampler_iter_yielded"):
            inner._sampler_iter_yielded = count
        self.handle.set_moment(after_skip)
        self._born = place["born"]
        if loader.num_workers:
            # Batch k is the work of worker k % n, as it was: its number and seed stay the same.
            turn_to(inner, count % loader.num_workers)
            for _ in range(self.handle.ahead()):
                inner._try_put_index()
        fresh = _as_begun(place)
        iteration = self.handle.iterate(inner, fresh, keeps_last=keeps_last)
        iteration.yielded = count
        if place["prefetched"]:
            if not loader.num_workers and "before_last" in place:
                self.handle.set_moment(place["before_last"])
            fresh["before_last"] = place.get("before_last")
            iteration.ready.append(next(inner))
        self.handle.placed.append(f"{count} batches skipped by index, none loaded")
        return iteration

    def _rebuild_order(self, place: Place) -> tuple[Iterator[object], bool]:
        """Draw the order again as far as it was used.

        Returns:
            The iterator over the indices, and whether it went on from the sampler's own state.
        """
        loader, count, saved = self.handle.loader, place["yielded"], place["order"]
        sampler = loader._index_sampler
        self.handle.set_moment(place["created"], samplers=True)
        if place["mode"] == "workers" and place["made"]:
            # Its iterator asks the sampler twice when it is made, and draws its seed in between.
            iter(sampler)
            draw_seed(loader)
        order: Iterator[object]
        if is_well_known(sampler):
            order = iter(sampler)
            if place["mode"] == "order" and place["first"]:
                self.handle.set_moment(place["first"])
            skipped = sum(1 for _ in islice(order, count))
            if skipped < count:
                self.handle.notes.append(
                    f"it has only {skipped} batches now, and {count} had been given"
                )
            return order, False
        log = DrawLog()
        order = watched = Order(sampler, log=log, remember=self.handle.ahead() + 3)
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
                self.handle.notes.append(
                    f"its {kind} draws random numbers at every index, more often than is kept; its "
                    "order may differ: give it state_dict and load_state_dict"
                )
            return False
        if saved["own"]:
            order.goes_on_from(saved["own"], count)
            return True
        self.handle.notes.append(
            f"its {kind} gave other indices than before: it is not seeded from the global random "
            "state or from a generator that it holds; seed it, or give it state_dict and "
            "load_state_dict"
        )
        return False

    def _replay_round(self, place: Place) -> None:
        self.handle.set_moment(place["created"], samplers=True)
        inner, _ = self.handle.new_iterator({})
        log = DrawLog()
        if place["log"]:
            log.load(place["log"])
        for number in range(place["yielded"] + bool(place["ended"])):
            log.apply(number)
            # How many there were is what the file says; more than there are end it all the same.
            if next(inner, _NOTHING) is _NOTHING:
                break

    def _resume_replay(
        self, place: Place, *, keeps_last: bool = False, anew: bool = False
    ) -> Iteration:
        states: dict[int, WorkerState] = {}
        if self.handle.has_workers() and not place["made"] and place["born"]:
            self.handle.set_moment(place["born"])
            # A worker that has delivered nothing yet in this epoch has not told how it began it;
            # where it ended the one before is the same, unless it drew after its last batch.
            states = _worker_states({**place["workers"], **place["begun"]})
            if not place["begun"]:
                self.handle.notes.append(
                    "its workers persist over epochs and their random states at the beginning of "
                    "this one are not known; use persistent_workers=False"
                )
        else:
            earlier = place.get("rounds", ())
            for each in earlier:
                self._replay_round(each)
            if earlier:
                total = sum(each["yielded"] for each in earlier)
                self.handle.placed.append(
                    f"{total} batches of earlier epochs loaded again and dropped"
                )
            self.handle.set_moment(
                place["created"], samplers=True, states=not (anew or place.get("rounds"))
            )
        self._rounds = list(place.get("rounds", ()))
        if isinstance(self.handle.loader, Stateful) and is_torchdata(self.handle.loader):
            self.handle.loader.load_state_dict({})
        inner, _ = self.handle.new_iterator(states)
        fresh = _as_begun(place)
        self._born = place["born"]
        iteration = self.handle.iterate(inner, fresh, keeps_last=keeps_last)
        count, prefetched = place["yielded"], place["prefetched"]
        log = iteration.log
        if log is not None and place["log"]:
            log.load(place["log"])
            if not log.is_complete:
                self.handle.notes.append(
                    "its dataset draws from random streams that training draws from, too, more "
                    "often than is kept; give it a generator of its own"
                )
        loaded = 0
        for number in range(count + prefetched):
            if log is not None:
                log.apply(number)
            batch = next(inner, _NOTHING)
            if number == 0 and not _is_first(batch, place):
                if not anew and self.handle.data.set_fresh_states():
                    # It takes its state for a place to begin at, and began anew by itself.
                    return self._resume_replay(place, keeps_last=keeps_last, anew=True)
                self.handle.notes.append(
                    "the first batch of its epoch is not the one it was, so its data is not what "
                    "it would have been: it keeps a state, or draws from something, that can't be "
                    "seen; give it state_dict and load_state_dict"
                )
            if batch is _NOTHING:
                self.handle.notes.append(
                    f"it has only {number} batches now, and {count} had been given"
                )
                break
            loaded += number < count
            if number >= count:
                iteration.ready.append(batch)
        if log is not None:
            log.resumed()
        iteration.yielded = loaded
        # Until a fresh iteration has shown that a loader's own state is a place.
        iteration.is_position = False
        self.handle.placed.append(f"{loaded} batches loaded again and dropped")
        return iteration

    def _resume_own(self, place: Place, *, keeps_last: bool) -> Iteration:
        loader, prefetched = self.handle.loader, place["prefetched"]
        self._resumed_own = True
        loader.load_state_dict(copy.deepcopy(place["own"]))
        self.handle.set_moment(place["born"] or place["created"])
        inner, _ = self.handle.new_iterator(_worker_states(place["workers"]))
        if self.handle.is_custom() and isinstance(loader, DataLoader):
            inner = started_apart(loader, inner, place["created"]["rng"]["torch"])
        fresh = _as_begun(place)
        self._born = place["born"]
        iteration = self.handle.iterate(inner, fresh, keeps_last=keeps_last)
        iteration.yielded = place["yielded"]
        if self.handle.is_custom():
            self.handle.is_position = iteration.is_position = True
            iteration.log = None
        if prefetched:
            if "batch" in place:
                iteration.ready.append(place["batch"])
            else:
                self.handle.set_moment(place["before_last"])
                iteration.ready.append(next(inner))
        self.handle.placed.append(f"it went on from its own state, at batch {place['yielded']}")
        return iteration


_NOTHING = object()


def _is_first(batch: object, place: Place) -> bool:
    """Return whether a batch is the one that an epoch began with, as far as that is known."""
    return "mark" not in place or (batch is not _NOTHING and mark_of(batch) == place["mark"])


def _is_position(iteration: Iteration) -> bool:
    """Return whether the state of a user's loader says where it is within an epoch."""
    if iteration.is_position is None:
        return iteration.yielded > 1
    return iteration.is_position


def _as_begun(place: Place) -> Place:
    """Return what a place says about the beginning of its iteration."""
    names = ("created", "born", "made", "first", "mark")
    return {name: place[name] for name in names if name in place}


def _weakly_fresh(position: ref[LoaderPosition], created: Place) -> Callable[[], Iterator[object]]:
    # No iteration may hold what holds it, see `_weakly`.
    def begin() -> Iterator[object]:
        alive = position()
        return iter(()) if alive is None else alive.begin_fresh(created)

    return begin


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
