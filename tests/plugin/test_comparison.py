"""Two batches have one fingerprint if and only if they hold the same."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lightning_sbckpt.plugin.comparison import fingerprint


class Plain:
    """Shows itself by its address."""

    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = ("__private", "value")

    def __init__(self, value):
        self.value = self.__private = value


@dataclass(repr=False)
class Graph:
    value: object


class Shape(Plain):
    def __repr__(self):
        return f"Shape({len(self.value)})"


class Item(NamedTuple):
    value: object


class Ring:
    def __init__(self, value):
        self.value, self.itself, self.weak = value, self, weakref.ref(self)


@pytest.mark.parametrize("kind", [Plain, Slotted, Graph, Shape, Item, Ring, SimpleNamespace])
def test_objects_are_compared_by_what_they_hold(kind):
    """A batch of a class of its own agrees with its copy in another process, and only with that."""

    def made(value):
        return [kind(value=value), {"x": kind(value=value)}]

    ones, zeros = torch.ones(3), torch.zeros(3)
    assert fingerprint(made(ones)) == fingerprint(made(ones.clone()))
    assert fingerprint(made(ones)) != fingerprint(made(zeros))


def test_long_arrays_are_compared_in_full():
    """The repr of numpy shows the ends of an array of more than a thousand numbers alone."""
    one, other = np.zeros(3000), np.zeros(3000)
    assert fingerprint(one) == fingerprint(other)
    other[1500] = 1
    assert fingerprint(one) != fingerprint(other)


def test_sets_are_compared_in_any_order():
    """The order of a set of texts is another in every process."""
    assert fingerprint({8, 0}) == fingerprint({0, 8})
    assert fingerprint({"a"}) != fingerprint({"b"})
