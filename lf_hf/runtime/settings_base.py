"""Settings that pydantic checks. A field is written once: its option and its documentation follow from it, too."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core.core_schema import LiteralSchema, literal_schema

from lf_hf.runtime.words import unknown_name

RULES = ConfigDict(allow_inf_nan=False, extra="forbid", use_attribute_docstrings=True)
"""The `config` of pydantic dataclasses of settings."""

NOT_GIVEN: Any = None
"""The default of a field that other fields decide."""

_KINDS = {int: "an integer", float: "a number", bool: "true or false"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<="}
_OTHER = "Other Parameters"  # of a docstring


@dataclass(frozen=True)
class OneOf:
    """Marks a field of words: those that it takes."""

    words: Iterable[str]

    def __get_pydantic_core_schema__(self, *_: object) -> LiteralSchema:
        return literal_schema(list(self.words))


@dataclass(frozen=True)
class Needs:
    """Marks a field that has no effect where this attribute of the settings is false; help shows it below `heading`."""

    attribute: str = ""
    heading: str = ""


def choices(field: FieldInfo) -> list[str]:
    """The words that a field takes, none if it takes a number or a truth."""
    return [word for mark in field.metadata if isinstance(mark, OneOf) for word in mark.words]


def needs(field: FieldInfo) -> Needs:
    """What a field needs to have an effect."""
    return next((mark for mark in field.metadata if isinstance(mark, Needs)), Needs())


def kind(field: FieldInfo) -> Any:
    """The type of a field: of `float | None`, float."""
    return (get_args(field.annotation) or (field.annotation,))[0]


def allowed(field: FieldInfo) -> str:
    """The values that a field takes, such as "a number > 0 and <= 1"."""
    if choices(field):
        return " or ".join(f'"{choice}"' for choice in choices(field))
    bounds = []
    for mark in field.metadata:
        bounds += [f"{sign} {getattr(mark, name)}" for name, sign in _SIGNS.items() if hasattr(mark, name)]
    return f"{_KINDS[kind(field)]} {' and '.join(bounds)}".strip()


SettingsType = TypeVar("SettingsType", bound="Settings")
Class = TypeVar("Class", bound=Any)


class Settings:
    """What dataclasses of settings share. A field that is given as None is as not given."""

    known: ClassVar[Mapping[str, FieldInfo]]
    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields that replace each other: one of them is given."""
    given_beside: ClassVar[tuple[str, ...]] = ()
    """Arguments of the functions that take these settings, which may be misspelt as well."""

    def _preset(self) -> Mapping[str, Any]:
        """Values of fields that were not given, where another field decides them."""
        return {}

    def _check_together(self) -> None:
        """Raise ValueError for values that exclude each other."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return {name: getattr(self, name) for name in self.known}

    def in_effect(self) -> dict[str, Any]:
        """The fields that a result depends on, JSON-ready."""
        return {name: value for name, value in self.to_dict().items() if value is not None and self.takes_effect(name)}

    def takes_effect(self, name: str) -> bool:
        """Whether a result depends on a field."""
        needed = needs(self.known[name]).attribute
        return not needed or bool(getattr(self, needed))

    @classmethod
    def taken_from(cls: type[SettingsType], kwargs: dict[str, Any], settings: SettingsType | None) -> SettingsType:
        """Take the fields out of `kwargs`, and put them in place of those of `settings`.

        Raises ValueError for values that are not allowed, and for names left in `kwargs` that look like a misspelt
        field.
        """
        if not isinstance(settings, cls | None):
            raise ValueError(
                f"The settings must be a {cls.__name__}, got {settings!r:.80}; give its fields as keyword arguments."
            )
        taken = {name: kwargs.pop(name) for name in cls.known if name in kwargs}
        given = {name: value for name, value in taken.items() if value is not None}
        names = (*cls.known, *cls.given_beside)
        for name in kwargs.keys() - {"token", *cls.given_beside}:  # the hub's token is no misspelt `tokens`
            if difflib.get_close_matches(name, names, n=1, cutoff=0.75):
                raise ValueError(unknown_name("argument", name, names))
        if settings is None:
            return cls(**given)
        kept = settings.to_dict()
        for name, value in settings._preset().items():
            if kept[name] == value:  # another preset may follow from what is given
                del kept[name]
        if given.keys() & set(cls.one_of):
            kept |= dict.fromkeys(cls.one_of)
        return cls(**kept | given)


def checked(cls: Class) -> Class:
    """Class decorator for pydantic dataclasses of settings: a sentence for what they refuse, and all fields in help."""
    validate = cls.__init__

    def __init__(self: Settings, *args: Any, **kwargs: Any) -> None:
        given = {}
        for name, value in [*zip(self.known, args, strict=False), *kwargs.items()]:
            if value is not None:
                given[name] = str(value) if isinstance(value, bool) else value  # pydantic would read True as 1
        try:
            validate(self, **given)
        except ValidationError as error:
            raise ValueError(_sentence(error, self.known)) from None
        for name, value in self._preset().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_together()

    __init__.__module__ = cls.__module__
    __init__.__signature__ = inspect.signature(cls)  # type: ignore[attr-defined]
    cls.__init__ = __init__
    cls.known = cls.__pydantic_fields__
    cls.__doc__ = _docstring(cls)
    return cls


def _sentence(error: ValidationError, known: Mapping[str, FieldInfo]) -> str:
    """What is wrong with the first of the values that were refused."""
    first = error.errors()[0]
    name, value = str(first["loc"][0]), first["input"]
    if name not in known:
        return unknown_name("setting", name, known)
    if first["type"] == "literal_error":
        return unknown_name(name, str(value), choices(known[name]))
    return f"{name} must be {allowed(known[name])}, got {value!r:.80}."


def _docstring(cls: type[Settings]) -> str:
    """A class's docstring with all fields."""
    lines = [str(cls.__doc__).rstrip(), "", "Parameters", "----------"]
    for name, field in cls.known.items():
        if needs(field).heading and _OTHER not in lines:
            lines += ["", _OTHER, "-" * len(_OTHER)]
        lines.append(f"{name} : {allowed(field)}, default {field.default}")
        lines.append(textwrap.indent(textwrap.fill(field.description or "", 116), "    "))
    return "\n".join(lines)
