"""Dataclasses as strict JSON, and from JSON that anybody may have written or edited.

Strict JSON has neither infinity nor NaN, so those are strings, as Protocol Buffers write them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}
_NOT_FINITE = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}


def json_ready(value: Any) -> Any:
    """Values of a dataclass, of lists and dicts, as strict JSON has them; `from_json` reads them back."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_FINITE[str(value)]
    return value


def parse_json(content: bytes | str, name: str) -> Any:
    """The value that a JSON text holds. Raises ValueError, with `name`, for a text that is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or numbers of endless digits
        raise ValueError(f"{name} is not JSON: {error}.") from None


def from_json(kind: Any, value: Any, name: str) -> Any:
    """A value of a type, such as a dataclass, from parsed JSON; fields that a dataclass does not know are left out.

    Raises ValueError, with `name` and the field, if a field is missing or has another type.
    """
    if kind is Any:
        return value
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType:  # all unions are `... | None`
        return None if value is None else from_json(arguments[0], value, name)
    is_dataclass = dataclasses.is_dataclass(kind)
    if origin is float and (type(value) is int or value in _NOT_FINITE.values()):
        with suppress(OverflowError):
            value = float(value)
    if type(value) is not (dict if is_dataclass else origin):
        raise ValueError(f"{name} must be {_KINDS.get(origin, 'an object')}, got {value!r:.80}.")
    if is_dataclass:
        return _dataclass_from_json(kind, value, name)
    if origin is list:
        return [from_json(arguments[0], item, f"{name}[{n}]") for n, item in enumerate(value)]
    if origin is dict:
        return {key: from_json(arguments[1], item, f"{name}[{key!r:.80}]") for key, item in value.items()}
    return value


def _dataclass_from_json(kind: Any, values: dict[str, Any], name: str) -> Any:
    fields = {}
    for key, field_type in get_type_hints(kind).items():
        if key in values:
            fields[key] = from_json(field_type, values[key], f"{name}.{key}")
    try:
        return kind(**fields)
    except TypeError as error:  # names the fields that are missing
        raise ValueError(f"{name} lacks a field ({error}).") from None
