"""Dataclasses as strict JSON, and from JSON that anybody may have written or edited.

JSON has no number that is infinite or none, so those are strings, as Protocol Buffers write them. What is read is
checked against its field's type.
"""

from __future__ import annotations

import dataclasses
import json
import math
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}


def json_ready(value: Any) -> Any:
    """A dataclass's values, of lists and dicts, as strict JSON has them: `from_json` reads them back."""
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    return [json_ready(item) for item in value] if isinstance(value, list | tuple) else value


def parse_json(content: bytes | str, name: str) -> Any:
    """The value that a JSON text holds. Raises ValueError, with `name`, for anything else."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or numbers of endless digits
        raise ValueError(f"{name} is not JSON: {error}.") from None


def from_json(kind: Any, value: Any, name: str) -> Any:
    """A value of some type, such as a dataclass, from parsed JSON; fields that a dataclass does not know are left out.

    Raises ValueError, with `name` and the field, if one is missing or of another type.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if kind is Any or (origin is UnionType and value is None):  # all unions are `... | None`
        return value
    if origin is UnionType:
        return from_json(arguments[0], value, name)
    if origin is list and isinstance(value, list):
        return [from_json(arguments[0], item, f"{name}[{n}]") for n, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: from_json(arguments[1], item, f"{name}[{key!r:.80}]") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        types = get_type_hints(kind)
        given = {key: from_json(types[key], item, f"{name}.{key}") for key, item in value.items() if key in types}
        try:
            return kind(**given)  # type: ignore[operator]
        except TypeError as error:  # which names the fields that are missing
            raise ValueError(f"{name} lacks a field ({error}).") from None
    if origin is float and (value in ("Infinity", "-Infinity", "NaN") or (type(value) is int and abs(value) < 1 << 63)):
        return float(value)
    if type(value) is origin:
        return value
    raise ValueError(f"{name} must be {_NAMES.get(origin, 'an object')}, got {value!r:.80}.")
