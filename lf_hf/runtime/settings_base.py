"""Settings of which each is written once: its help, bounds and choices stand beside its name, type and default.

Checks, reading from strings, docstrings, command-line options and hints about misspelt names follow from them.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import numpy as np

from lf_hf.runtime.words import unknown_name

_KINDS = {int: "an integer", float: "a number", bool: "true or false"}
_TRUTHS = {"true": True, "false": False}
_OTHER = "Other Parameters"  # of a docstring


@dataclass(frozen=True)
class Setting:
    """A field of settings."""

    help: str
    default: Any
    choices: tuple[str, ...] = ()
    at_least: float = -inf
    above: float = -inf
    at_most: float = inf
    unset: str = ""  # says where the value comes from if the default is None
    needs: str = ""  # an attribute of the settings: where it is false, the value has no effect
    heading: str = ""  # stands above it, and others like it, in help
    name: str = ""
    kind: type = str

    @property
    def allowed(self) -> str:
        """The values that are allowed, such as "a number > 0 and <= 1"."""
        if self.choices:
            return " or ".join(f'"{choice}"' for choice in self.choices)
        limits = {">=": self.at_least, ">": self.above, "<=": self.at_most}
        bounds = " and ".join(f"{sign} {limit}" for sign, limit in limits.items() if abs(limit) < inf)
        return f"{_KINDS[self.kind]} {bounds}".strip()

    def checked(self, value: Any) -> Any:
        """The value in the field's type; strings and numpy's numbers are converted.

        Raises ValueError for a value that is not allowed.
        """
        if value is None and self.default is None:
            return None
        if self.choices:
            if value not in self.choices:
                raise ValueError(unknown_name(self.name, str(value), self.choices))
            return value
        number = self._converted(value)
        if number is None or not self._within_bounds(number):
            raise ValueError(f"{self.name} must be {self.allowed}, got {value!r:.80}.")
        return number

    def _converted(self, value: Any) -> Any:
        """The value in the field's type, None if it has none there."""
        if self.kind is bool:
            return _TRUTHS.get(str(value).strip().lower())
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str) or (self.kind is float and type(value) is int):
            with suppress(ValueError, OverflowError):
                value = self.kind(value)
        return value if type(value) is self.kind else None

    def _within_bounds(self, number: float) -> bool:
        return self.above < number < inf and self.at_least <= number <= self.at_most


def setting(default: Any, help: str, **attributes: Any) -> Any:
    """A field of a dataclass of settings, with the attributes of a Setting."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, default, **attributes)})


SettingsType = TypeVar("SettingsType", bound="Settings")


class Settings:
    """What frozen dataclasses of settings share; the decorator `documented` completes them."""

    known: ClassVar[Mapping[str, Setting]]
    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields that replace each other: one of them is given."""
    given_beside: ClassVar[tuple[str, ...]] = ()
    """Arguments of the functions that take these settings, which may be misspelt as well."""

    def __post_init__(self) -> None:
        for name, value in self._preset().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in self.known:
            self._check(name)
        self._check_together()

    def _check(self, name: str) -> None:
        object.__setattr__(self, name, self.known[name].checked(getattr(self, name)))

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
        values = {}
        for name, setting in self.known.items():
            value = getattr(self, name)
            has_effect = not setting.needs or getattr(self, setting.needs)
            if value is not None and has_effect:
                values[name] = value
        return values

    @classmethod
    def from_kwargs(cls: type[SettingsType], **kwargs: Any) -> SettingsType:
        """The settings; raises ValueError for an unknown name, too, and names the nearest known one."""
        for name in kwargs:
            if name not in cls.known:
                raise ValueError(unknown_name("setting", name, cls.known))
        return cls(**kwargs)

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
        given = {name: kwargs.pop(name) for name in cls.known if name in kwargs}
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
        if any(given.get(name) is not None for name in cls.one_of):
            kept |= dict.fromkeys(cls.one_of)
        return cls(**kept | given)


def documented(cls: type[SettingsType]) -> type[SettingsType]:
    """Class decorator for dataclasses of settings: gives them `known`, and a docstring with all fields."""
    types = get_type_hints(cls)
    known = {}
    lines = [str(cls.__doc__).rstrip(), "", "Parameters", "----------"]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind, *_ = get_args(types[field.name]) or (types[field.name],)  # of `float | None`: float
        setting = dataclasses.replace(field.metadata["setting"], name=field.name, kind=kind)
        known[field.name] = setting
        if setting.heading and _OTHER not in lines:
            lines += ["", _OTHER, "-" * len(_OTHER)]
        lines.append(f"{setting.name} : {setting.allowed}, default {setting.unset or setting.default}")
        lines.append(textwrap.indent(textwrap.fill(setting.help, 116), "    "))
    cls.known = known
    cls.__doc__ = "\n".join(lines)
    return cls
