"""Settings of which each is written once: a field's help, bounds and choices stand beside its name, type and default.

Checks, reading from strings, docstrings, command-line options and hints about misspelt names all follow from them.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import sys
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

_COMPARISONS = {"==": operator.eq, ">": operator.gt, ">=": operator.ge, "<=": operator.le}
_MOST_LISTED = 30  # known names in a sentence


@dataclass(frozen=True)
class Setting:
    """A field of settings."""

    help: str
    bounds: str = ""  # of numbers, such as "> 0 and <= 1", or "0 or >= 1024"
    choices: tuple[str, ...] = ()
    unset: str = ""  # where the value comes from if the default is None
    needs: tuple[str, ...] = ()  # attributes of the settings: one of them, if any, is true where it has an effect
    name: str = ""
    kind: type = str
    default: Any = None

    @property
    def allowed(self) -> str:
        """What a value may be."""
        if self.choices:
            return "{" + ", ".join(f'"{choice}"' for choice in self.choices) + "}"
        return "true or false" if self.kind is bool else f"{self.kind.__name__} {self.bounds}".strip()

    @property
    def described(self) -> str:
        """What a value may be, and the default, as in a docstring."""
        default = f"default={self.default!r}".replace("'", '"')
        if self.default is None:
            default = f"default {self.unset}" if self.unset else "optional"
        return f"{self.allowed}, {default}"

    def checked(self, value: Any) -> Any:
        """A value in the field's type, also from a string or numpy's. Raises ValueError for any that is not allowed."""
        if value is None and self.default is None:
            return None
        converted = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, str):
            with suppress(KeyError, ValueError):
                word = value.strip().lower()
                converted = {"true": True, "false": False}[word] if self.kind is bool else self.kind(value)
        if self.choices and isinstance(converted, str) and converted not in self.choices:
            raise ValueError(unknown_name(self.name, converted, self.choices))
        finite = type(converted) in (int, float) and abs(converted) <= sys.float_info.max
        of_kind = type(converted) is self.kind or (self.kind is float and finite)
        if not of_kind or not self._within_bounds(converted):
            article = "" if self.choices else {int: "an ", float: "a ", str: "a "}.get(self.kind, "")
            raise ValueError(f"{self.name} must be {article}{self.allowed}, got {value!r:.80}.")
        return self.kind(converted)

    def _within_bounds(self, value: Any) -> bool:
        def holds(bound: str) -> bool:
            *sign, limit = bound.split()  # a number without a sign is a value by itself
            return bool(_COMPARISONS[sign[0] if sign else "=="](value, float(limit)))

        alternatives = self.bounds.split(" or ") if self.bounds else []
        return not alternatives or any(all(map(holds, bounds.split(" and "))) for bounds in alternatives)


def setting(default: Any, help: str, **known: Any) -> Any:
    """A field of a dataclass of settings; `known` are attributes of Setting."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, default=default, **known)})


SettingsType = TypeVar("SettingsType", bound="Settings")


class Settings:
    """What frozen dataclasses of settings share; `documented` completes them."""

    known: ClassVar[Mapping[str, Setting]]
    noun: ClassVar[str]
    """What one of them is called where a name is unknown."""
    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields of which one is given, in place of the others."""

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
        """What fields are that were not given, where another field decides that."""
        return {}

    def _check_together(self) -> None:
        """Raise ValueError for values that exclude each other."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return {name: getattr(self, name) for name in self.known}

    def in_effect(self) -> dict[str, Any]:
        """The fields that a result depends on, JSON-ready."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if value is not None and (not (needs := self.known[name].needs) or any(getattr(self, n) for n in needs))
        }

    @classmethod
    def from_kwargs(cls: type[SettingsType], **kwargs: Any) -> SettingsType:
        """As the class itself, but raises ValueError for an unknown name, too, and names the nearest known one."""
        for name in kwargs:
            if name not in cls.known:
                raise ValueError(unknown_name(cls.noun, name, cls.known))
        return cls(**kwargs)

    @classmethod
    def taken_from(cls: type[SettingsType], kwargs: dict[str, Any], settings: SettingsType | None) -> SettingsType:
        """Settings with the fields among `kwargs`, which are taken out there, in place of their own.

        Raises ValueError for values that are not allowed, and for other names that look like a misspelt field.
        """
        if not isinstance(settings, cls | None):
            raise ValueError(
                f"The settings must be a {cls.__name__}, got {settings!r:.80}; give its fields as keyword arguments."
            )
        given = {name: kwargs.pop(name) for name in cls.known if name in kwargs}
        for name in kwargs.keys() - {"token"}:  # the hub's, which is no misspelt `tokens`
            if difflib.get_close_matches(name, cls.known, n=1, cutoff=0.75):
                raise ValueError(unknown_name("argument", name, cls.known))
        if settings is None:
            return cls(**given)
        # What a preset filled in goes with the old preset, and what is given in another way now goes, too.
        own, preset = settings.to_dict(), settings._preset()
        replaced = cls.one_of if any(given.get(name) is not None for name in cls.one_of) else ()
        kept = {name: own[name] for name in own if name not in replaced and own[name] != preset.get(name)}
        return cls(**kept | given)


def documented(cls: type[SettingsType]) -> type[SettingsType]:
    """Class decorator for dataclasses of settings: gives them `known`, and a docstring with all fields."""
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    cls.known = {
        field.name: dataclasses.replace(
            field.metadata["setting"], name=field.name, kind=kinds[str(field.type).removesuffix(" | None")]
        )
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    entries = (
        f"{name} : {known.described}\n{textwrap.indent(textwrap.fill(known.help, 116), '    ')}"
        for name, known in cls.known.items()
    )
    raises = "Raises\n------\nValueError\n    If a value has the wrong type, is out of range, or is no known choice."
    cls.__doc__ = "\n".join([f"{cls.__doc__}\n\nParameters\n----------", *entries, f"\n{raises}\n"])
    return cls


def plural(count: int, noun: str) -> str:
    """A noun after a number."""
    return noun if count == 1 else f"{noun}s"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence that says that `name` is no known `kind`, with the nearest one if there is one."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names if len(names) <= _MOST_LISTED else [*names[:_MOST_LISTED], "..."])
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {listed}."
    return f"Unknown {kind} {name!r:.80}; {hint}"
