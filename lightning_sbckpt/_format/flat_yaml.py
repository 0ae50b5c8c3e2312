"""A fast reader for the plainest YAML: lines of `key: scalar`.

Nearly every `CKPT.yaml` is that and nothing else, and among thousands of them a YAML parser is what
takes the time. `parse_flat` knows a small part of YAML 1.1, for which it gives exactly what
PyYAML's safe loader gives; whatever it isn't sure of it leaves to that loader.

The forms of scalars are those of PyYAML's `yaml/resolver.py`, narrowed to what its dumper writes.
"""

from __future__ import annotations

import re

import yaml

# Printable ASCII alone: ends of lines, byte order marks and what YAML refuses are the loader's.
_WORD = r"[A-Za-z_][A-Za-z0-9_./+-]*"
_LINE = re.compile(
    r"(?:"
    rf"({_WORD}): "
    r"(?:"
    r"(-?[0-9]{1,40}\.[0-9]{1,40}(?:e[-+][0-9]{1,4})?)"
    r"|(-?(?:0|[1-9][0-9]{0,17}))"
    r"|'([ -&(-~]*)'"
    rf"|({_WORD}(?: {_WORD})*|-?\.inf|\.nan)"
    r"|([0-9][A-Za-z0-9_./+-]*)"
    r")"
    r"|#[ -~]*"
    r")\n"
)
_FLOAT, _INT, _QUOTED, _STRANGE = 2, 3, 4, 6

_MAX_KEY = 128  # YAML's own limit is 1,024; beyond it a key is an error.
_NUMBERS: dict[str, float] = {
    ".inf": yaml.SafeLoader.inf_value,
    "-.inf": -yaml.SafeLoader.inf_value,
    ".nan": yaml.SafeLoader.nan_value,
}
_CONSTANTS: dict[str, object] = {"true": True, "false": False, "null": None, **_NUMBERS}
# The loader's own way of telling what is no word, by first characters.
_FORMS: dict[str, list[tuple[str, re.Pattern[str]]]] = yaml.SafeLoader.yaml_implicit_resolvers
# Words that YAML 1.1 takes for something else than a word, in any case of letters, to be sure.
_OTHER = {"yes", "no", "on", "off", "true", "false", "null"}


def parse_flat(data: bytes) -> dict[str, object] | None:
    r"""Return the mapping in `data`, or None if a YAML loader has to read it.

    Args:
        data: The bytes of a YAML file.

    Returns:
        What the safe loader would return, or None: not "it is empty", but "it can't be told here".

    Example:
        >>> parse_flat(b"unixtime: 1.5\nend-of-epoch: true\n")
        {'unixtime': 1.5, 'end-of-epoch': True}
        >>> parse_flat(b"classes: [a, b]\n") is None
        True
    """
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        return None
    parsed: dict[str, object] = {}
    position, match_line = 0, _LINE.match
    while position < len(text):
        found = match_line(text, position)
        if found is None:
            return None
        position = found.end()
        kind = found.lastindex
        if kind is None:
            continue  # A comment.
        key, value = found[1], found[kind]
        if len(key) > _MAX_KEY or key.lower() in _OTHER:
            return None
        if kind == _FLOAT:
            parsed[key] = float(value)
        elif kind == _INT:
            parsed[key] = int(value)
        elif kind == _QUOTED:
            parsed[key] = value
        elif kind == _STRANGE:
            # A commit, perhaps, or a date, or a number in another system.
            if any(form.match(value) for _, form in _FORMS.get(value[0], ())):
                return None
            parsed[key] = value
        elif value in _CONSTANTS:
            parsed[key] = _CONSTANTS[value]
        elif value.lower() in _OTHER:
            return None
        else:
            parsed[key] = value
    return parsed or None
