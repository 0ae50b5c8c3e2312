"""YAML that holds tensors, too, and that may come from anyone: to read it runs nothing.

A tensor of more than one element is a mapping marked by the key `!tensor`; a YAML tag in its place
would keep every other reader from reading the rest. Beside code, two things are refused that a small
file can do to its reader: nesting that ends the process, and aliases that grow without end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import yaml

from lightning_sbckpt._format.flat_yaml import parse_flat
from lightning_sbckpt._format.python_yaml import Part, add_constructors, is_long_key
from lightning_sbckpt._io.lazy import is_tensor, torch
from lightning_sbckpt.errors import MetaError, brief

TENSOR_MARK = "!tensor"
MAX_META_BYTES = 16 * 2**20
_MAX_DEPTH = 200
_LONGEST_NUMBER = 1_000
_LARGEST_EMPTY = 2**20


class _Dumper(yaml.SafeDumper):
    """The safe dumper, and our marked mapping for tensors."""

    def ignore_aliases(self, data: object) -> bool:
        """Write every value in full: an alias would make a person look for its anchor."""
        return True


def _represent_tensor(dumper: _Dumper, tensor: object) -> yaml.Node:
    if not is_tensor(tensor):
        return dumper.represent_undefined(tensor)
    fields = {
        TENSOR_MARK: str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": _numbers(tensor),
    }
    return dumper.represent_mapping("tag:yaml.org,2002:map", fields, flow_style=True)


def _numbers(tensor: torch.Tensor) -> list[object]:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    numbers: list[object] = tensor.flatten().tolist()
    return numbers


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML can't read these back, which YAML 1.1 takes for ends of lines, unless they are escaped.
    quoted = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


# Of whatever has no other: to name the class would import torch.
_Dumper.add_representer(None, _represent_tensor)  # type: ignore[arg-type]
_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: Mapping[str, object]) -> str:
    """Return values as YAML, keys in the order given.

    Args:
        values: Plain ones and tensors.

    Example:
        >>> print(dump_yaml({"loss": torch.tensor([1.0, 2.0])}), end="")
        loss: {'!tensor': float32, shape: [2], data: [1.0, 2.0]}
    """
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, in C where PyYAML was built with it."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merge keys: a few lines of them grow without end, and no writer makes them."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise MetaError("it has the merge key '<<'")
        # A tuple is hashed in full each time it is a key, tuples in it and all.
        if any(is_long_key(key) for key, _ in node.value):
            raise MetaError("it has a long tuple as a key")
        super().flatten_mapping(node)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """Refuse numbers of thousands of digits: to make them takes the square of their length."""
        if len(node.value) > _LONGEST_NUMBER:
            raise MetaError(f"it has a number of {len(node.value):,} characters")
        number: int = self.construct_yaml_int(node)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
add_constructors(_Loader)


def _with_tensors(value: object, seen: dict[int, object]) -> object:
    # What stands behind several aliases is looked at once, or a small file could keep us for years.
    if id(value) not in seen:
        if isinstance(value, dict) and TENSOR_MARK in value:
            seen[id(value)] = _tensor_from(value)
        elif isinstance(value, (dict, list)):
            seen[id(value)] = value
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in list(items):
                value[key] = _with_tensors(item, seen)
        else:
            return value
    return seen[id(value)]


def _tensor_from(fields: dict[str, object]) -> torch.Tensor:
    dtype = getattr(torch, str(fields[TENSOR_MARK]), None)
    if not isinstance(dtype, torch.dtype):
        raise MetaError(f"a tensor in meta has the unknown dtype {fields[TENSOR_MARK]!r}")
    shape = [int(length) for length in cast("list[int]", fields["shape"])]
    if 0 in shape and math.prod(length for length in shape if length) > _LARGEST_EMPTY:
        raise MetaError("a tensor in meta is empty and of an enormous shape")
    if dtype.is_complex:
        parts = torch.tensor(fields["data"], dtype=dtype.to_real(), device="cpu").reshape(*shape, 2)
        return torch.view_as_complex(parts)
    return torch.tensor(fields["data"], dtype=dtype, device="cpu").reshape(shape)


def parse_yaml(data: bytes, path: Path | str) -> dict[str, object]:
    """Return the mapping that a YAML file of ours holds; tags of Python are never executed.

    Args:
        data: The bytes of the file.
        path: Where they are from, for the message.

    Returns:
        The mapping.

    Raises:
        MetaError: The bytes are not YAML, hold a tag that isn't safe, or are not a mapping.

    Example:
        >>> parse_yaml(b"loss: 0.5", "CKPT.yaml")
        {'loss': 0.5}
        >>> parse_yaml(b"!!python/object/apply:os.getcwd []", "CKPT.yaml")
        Traceback (most recent call last):
        lightning_sbckpt.errors.MetaError: CKPT.yaml can't be read as safe YAML: ...
    """
    if len(data) > MAX_META_BYTES:
        raise MetaError(
            f"{path} has {len(data):,} bytes, more than the {MAX_META_BYTES:,} that meta may have"
        )
    flat = parse_flat(data)
    if flat is not None:
        return flat
    try:
        _refuse_depth(data)
        loaded = yaml.load(data, Loader=_Loader)  # noqa: S506 - it is safe
        _refuse_growth(loaded, {})
        parsed = loaded
        if isinstance(loaded, dict):
            # The meta itself is no tensor, whatever its keys.
            seen: dict[int, object] = {id(loaded): loaded}
            named = {key: value for key, value in loaded.items() if isinstance(key, str)}
            # Others may write keys that are no text; everything here takes them by their text.
            for key in loaded.keys() - named.keys():
                named.setdefault(brief(key), loaded[key])
            parsed = {key: _with_tensors(value, seen) for key, value in named.items()}
    except Exception as error:  # PyYAML's constructors raise whatever a strange value leads to.
        raise MetaError(f"{path} can't be read as safe YAML: {error}") from error
    if not isinstance(parsed, dict):
        raise MetaError(f"{path} holds a {type(parsed).__name__}, expected a mapping of keys")
    return parsed


def _refuse_growth(value: object, seen: dict[int, int | None]) -> int:
    """Return about how many characters a value has when it is written without aliases.

    A few lines of aliases of aliases take no memory, and more time than there is as soon as
    somebody prints, compares or copies them.
    """
    if isinstance(value, Part):
        raise MetaError("it has a name or a part of a value where a value should be")
    if isinstance(value, str):
        return 1 + len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    size = seen.get(id(value), 0)
    if size is None:
        raise MetaError("it has a value that contains itself")
    if not size:
        seen[id(value)] = None
        items = [*value, *value.values()] if isinstance(value, dict) else value
        size = 1 + sum(_refuse_growth(item, seen) for item in items)
        if size > MAX_META_BYTES:
            raise MetaError("its aliases grow without end")
        seen[id(value)] = size
    return size


def _refuse_depth(data: bytes) -> None:
    # The parser in C recurses, and what is nested too deep ends the process.
    if sum(map(data.count, (b"[", b"{", b"- ", b"? ", b": "))) <= _MAX_DEPTH:
        return
    depth = 0
    for event in yaml.parse(data, Loader=_Loader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > _MAX_DEPTH:
                raise MetaError(f"it is nested more than {_MAX_DEPTH} deep")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
