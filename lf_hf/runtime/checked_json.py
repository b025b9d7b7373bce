"""Dataclasses as strict JSON, and from JSON that anybody may have written or edited.

JSON has no number that is infinite or none, so those are strings, as Protocol Buffers write them. What is read is
checked against its field's type.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_NOT_FINITE = ("Infinity", "-Infinity", "NaN")
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}


def json_ready(value: Any) -> Any:
    """A dataclass's values, of lists and dicts, as strict JSON has them: `dataclass_from_json` reads them back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def parse_json(content: bytes | str, name: str) -> Any:
    """The value that a JSON text holds. Raises ValueError, with `name`, for anything else."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or numbers of endless digits
        raise ValueError(f"{name} is not JSON: {error}.") from None


def dataclass_from_json(kind: type[Record], values: Any, name: str) -> Record:
    """A dataclass from parsed JSON; fields that it does not know are left out.

    Raises
    ------
    ValueError
        If a field is missing or its value is of another type; the message has `name` and the field.
    """
    return cast(Record, _checked(kind, values, name))


def _checked(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:  # all of them are `... | None`
        [other] = [argument for argument in arguments if argument is not NoneType]
        return None if value is None else _checked(other, value, name)
    if origin is list and isinstance(value, list):
        return [_checked(arguments[0], item, f"{name}[{n}]") for n, item in enumerate(value)]
    if isinstance(value, dict) and (origin or kind) is dict:
        return {key: _checked(arguments[1], item, f"{name}[{key!r:.80}]") for key, item in value.items()}
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        types = get_type_hints(kind)
        fields = [field for field in dataclasses.fields(kind) if field.name in value or _is_required(field)]
        for field in fields:
            if field.name not in value:
                raise ValueError(f"{name} lacks {field.name!r}.")
        make = cast(Callable[..., Any], kind)
        return make(**{f.name: _checked(types[f.name], value[f.name], f"{name}.{f.name}") for f in fields})
    if kind is float and type(value) is int and abs(value) < 1 << 63:
        return float(value)
    if kind is float and value in _NOT_FINITE:
        return float(value)
    if type(value) is kind:
        return value
    raise ValueError(f"{name} must be {_NAMES.get(origin or kind, 'an object')}, got {value!r:.80}.")


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
