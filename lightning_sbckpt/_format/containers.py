"""Walks through nested containers that visit each container once, however deep and however shared.

`torch.save` keeps a list that a state holds twice one list, and takes one that contains itself. A copy
of a state with some of its values replaced has to do so as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

CONTAINERS = (dict, OrderedDict, list, tuple)
"""What is looked into: exactly these, since a subclass may hold more than its members."""

_ATOMS = {int, float, bool, str, type(None)}

Where = tuple[object, ...]
Place = tuple["Place", object] | None
"""A place in a value: the place of the container, and the key or index in it; None is the root."""


class _Node:
    """A value on the way to its copy."""

    __slots__ = ("copy", "done", "found", "shell", "value")

    def __init__(self, value: object, found: object) -> None:
        # Both are kept: an id is only good as long as its object lives.
        self.value, self.found = value, found
        kind = type(found)
        self.done = kind not in CONTAINERS
        self.shell: Any = None if self.done or kind is tuple else kind()
        self.copy: Any = found if self.done else self.shell


def rebuild(
    root: object,
    enter: Callable[[object], object] | None = None,
    leave: Callable[[object], object] | None = None,
    swap: Mapping[tuple[int, object], object] | None = None,
) -> Any:
    """Return a copy of nested containers with some of its values replaced.

    What is one object in the original is one object in the copy. The work is proportional to the
    number of values; depth costs nothing.

    Args:
        root: The outermost value; it is left as it is.
        enter: Called once with each value but numbers, texts and None, before what is in it is
            visited; returns the value, or what takes its place and is visited instead.
        leave: Called with the copy of each container once, when its members are in it; returns the
            copy, or what takes its place.
        swap: What takes the place of members, by the id of the container and the key or index; it is
            not visited.

    Returns:
        The copy.

    Example:
        >>> shared = [1]
        >>> copy = rebuild({"a": shared, "b": (shared,)})
        >>> copy["a"] is copy["b"][0], copy["a"] is shared
        (True, False)
    """
    nodes: dict[int, _Node] = {}
    unfinished: list[_Node] = []
    swap = swap or {}

    def is_kept(value: object) -> bool:
        # Of a list of a million numbers nothing is remembered.
        kind = type(value)
        return kind in _ATOMS or (enter is None and kind not in CONTAINERS)

    def node_of(value: object) -> _Node:
        node = _Node(value, value if enter is None else enter(value))
        nodes[id(value)] = node
        return node

    def fill(node: _Node) -> bool:
        """Put the copies of the members in place; return whether all of them are done."""
        found, complete, copies = node.found, True, []
        for key, value in members_of(found):
            if (id(found), key) in swap:
                copies.append((key, swap[id(found), key]))
                continue
            if is_kept(value):
                copies.append((key, value))
                continue
            child = nodes[id(value)]
            complete = complete and child.done
            copies.append((key, child.copy))
        if node.shell is None:
            node.copy = tuple(copy for _, copy in copies)
        elif isinstance(node.shell, dict):
            node.shell.update(copies)
            if type(found) is OrderedDict:
                # A module's state_dict carries the versions of its layers as an attribute.
                node.shell.__dict__.update(found.__dict__)
        else:
            node.shell[:] = [copy for _, copy in copies]
        return complete

    stack = [(first, members_of(first.found))] if not (first := node_of(root)).done else []
    while stack:
        node, members = stack[-1]
        for key, value in members:
            if is_kept(value) or id(value) in nodes or (id(node.found), key) in swap:
                continue
            child = node_of(value)
            if not child.done:
                stack.append((child, members_of(child.found)))
                break
        else:
            stack.pop()
            # A tuple that contains a list that contains the tuple is made after the list.
            if not fill(node) and node.shell is not None:
                unfinished.append(node)
            if leave is not None:
                node.copy = leave(node.copy)
            node.done = True
    for node in unfinished:
        fill(node)
    return first.copy


def members_of(container: Any) -> Iterator[tuple[object, object]]:
    """Yield the keys or indices of a container, each with the member there."""
    if isinstance(container, dict):
        return iter(container.items())
    return iter(enumerate(container))


def containers_in(
    root: object, within: Callable[[object], bool] = lambda _: True
) -> Iterator[tuple[Place, Any]]:
    """Yield each container in a value once, with one of the places where it is.

    Args:
        root: The value.
        within: Says of each container in it whether it is looked into.
    """
    seen: dict[int, object] = {}
    waiting: list[tuple[Place, object]] = [(None, root)]
    while waiting:
        place, value = waiting.pop()
        if type(value) in CONTAINERS and id(value) not in seen and within(value):
            seen[id(value)] = value
            yield place, value
            inner = [((place, key), member) for key, member in members_of(value)]
            waiting += reversed(inner)


def where_is(place: Place) -> Where:
    """Return the keys and indices that lead from the root to a place."""
    steps: list[object] = []
    while place is not None:
        place, key = place
        steps.append(key)
    return tuple(reversed(steps))
