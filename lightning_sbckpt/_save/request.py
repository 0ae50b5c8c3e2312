"""What a new checkpoint says about itself, and the keys that the meta of every checkpoint has."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_sbckpt.errors import MetaError
from lightning_sbckpt.meta import END_OF_TIME, plain_meta

# The smallest step that a double still tells apart at today's count of seconds, generously.
_TICK = 1e-5


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about itself.

    Attributes:
        meta: As `meta_of_new` returns it.
        name: The checkpoint's own name, or None to name it by time.
        lineage: Where these weights come from, for the manifest.
        verbosity: The level of the log line.
        documents: Small files of text for people, by name.
    """

    meta: Mapping[str, object]
    name: str | None
    lineage: Mapping[str, object]
    verbosity: int
    documents: Mapping[str, str] = field(default_factory=dict)


def time_after(newest: float) -> float:
    """Return the time, but later than that of the newest checkpoint by any means.

    A clock that stands still or jumps back must not change the order of checkpoints.
    """
    # Of a time far in the future the tick is too small a part.
    return max(time.time(), newest + _TICK, math.nextafter(newest, math.inf))


def meta_of_new(
    given: Mapping[str, object], *, unixtime: float, end_of_epoch: bool
) -> dict[str, object]:
    """Return plain meta for a new checkpoint: the keys of every checkpoint, then those given.

    Raises:
        MetaError: YAML can't hold what is given, or it sets a key of every checkpoint to what is
            of no use there.
    """
    plain = plain_meta(given)
    own = plain.get("unixtime", 0.0)
    usable = isinstance(own, (int, float)) and abs(own) < END_OF_TIME
    if not usable or not isinstance(plain.get("end-of-epoch", True), bool):
        raise MetaError(
            "meta sets a key that every checkpoint has: 'unixtime' must be a number of seconds before "
            "the year 10000, so that later ones can follow, and 'end-of-epoch' true or false, got "
            f"{own!r} and {plain.get('end-of-epoch', True)!r}. Choose other keys, or leave these out"
        )
    return {"unixtime": unixtime, "end-of-epoch": end_of_epoch, **plain}
