"""Settings of which each is written once: a field's help, bounds and choices stand beside its name, type and default.

Checks, reading from strings, docstrings, command-line options and hints about misspelt names all follow from them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import operator
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

LARGEST_INTEGER = 2**32 - 1  # what every library takes, as a seed too
_MOST_LISTED = 30  # known names in a sentence


@dataclass(frozen=True)
class Setting:
    """A field of settings.

    Attributes
    ----------
    help : str
    minimum, maximum, above : float or None
        Bounds; `above` is a lower one that is not allowed itself.
    also : int or None
        A value outside these bounds that is allowed too.
    choices : tuple of str
    unset : str
        Where the value comes from if the default is None.
    needs : tuple of str
        Attributes of the settings, one of which must be true for the field to have an effect; () if it always has.
    name, kind, default
        As in the class; `kind` is the type.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    also: int | None = None
    choices: tuple[str, ...] = ()
    unset: str = ""
    needs: tuple[str, ...] = ()
    name: str = ""
    kind: type = str
    default: Any = None

    @property
    def described(self) -> str:
        """Type, bounds and default, as in a docstring."""
        also = "" if self.also is None else f", {self.also} or"
        kind = "{" + ", ".join(f'"{choice}"' for choice in self.choices) + "}" if self.choices else self.kind.__name__
        default = f", default={self.default!r}".replace("'", '"')
        if self.default is None:
            default = f", default {self.unset}" if self.unset else ", optional"
        return f"{kind}{also}{self._bounds('>=', '>', '<=')}{default}"

    @property
    def allowed(self) -> str:
        """What a value must be, in words."""
        also = "" if self.also is None else f"{self.also} or "
        words = {str: f"one of {', '.join(self.choices)}", bool: "true or false", int: "an integer"}
        return (
            f"{also}{words.get(self.kind, 'a finite number')}{self._bounds('of at least', 'greater than', 'at most')}"
        )

    def _bounds(self, *words: str) -> str:
        bounds = zip(words, (self.minimum, self.above, self.maximum), strict=True)
        return " and".join(f" {word} {bound:g}" for word, bound in bounds if bound is not None)

    def parsed(self, value: Any) -> Any:
        """A string read as the field's type, where it can be; any other value as it is."""
        if not isinstance(value, str) or self.kind is str:
            return value
        try:
            return {"true": True, "false": False}[value.strip().lower()] if self.kind is bool else self.kind(value)
        except (KeyError, ValueError):
            return value

    def checked(self, value: Any) -> Any:
        """A value in the field's type, also from one of numpy's. Raises ValueError for any that is not allowed."""
        if value is None and self.default is None:
            return None
        value = value.item() if isinstance(value, np.generic) else value
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise ValueError(unknown_name(self.name, value, self.choices))
        allowed, result = self.allowed, value
        if self.kind is int:
            result = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else None
            if result is not None and result > LARGEST_INTEGER:
                allowed, result = f"at most {LARGEST_INTEGER}", None
        elif self.kind is float:
            result = _finite(value)
        if result is None or not self._holds(result):
            raise ValueError(f"{self.name} must be {allowed}, got {value!r:.80}.")
        return result

    def _holds(self, value: Any) -> bool:
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return value in self.choices
        lower = (self.minimum is None or value >= self.minimum) and (self.above is None or value > self.above)
        return value == self.also or (lower and (self.maximum is None or value <= self.maximum))


def setting(default: Any, help: str, **known: Any) -> Any:
    """A field of a dataclass of settings; `known` are attributes of Setting."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, default=default, **known)})


SettingsType = TypeVar("SettingsType", bound="Settings")
Function = TypeVar("Function", bound=Callable[..., Any])


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
    def field_names(cls) -> tuple[str, ...]:
        """Names of all fields."""
        return tuple(cls.known)

    @classmethod
    def from_kwargs(cls: type[SettingsType], **kwargs: Any) -> SettingsType:
        """Build from values that may be strings, as command lines and model args give them.

        Raises
        ------
        ValueError
            For an unknown name (the nearest known one is named) or a value that is not allowed.
        """
        for name in kwargs:
            if name not in cls.known:
                raise ValueError(unknown_name(cls.noun, name, cls.field_names()))
        return cls(**{name: cls.known[name].parsed(value) for name, value in kwargs.items()})

    @classmethod
    def taken_from(cls: type[SettingsType], kwargs: dict[str, Any], settings: SettingsType | None) -> SettingsType:
        """Settings with the fields among `kwargs`, which are taken out there, in place of their own.

        Raises
        ------
        ValueError
            For values that are not allowed, and for other names in `kwargs` that look like a misspelt field.
        """
        if not isinstance(settings, cls | None):
            raise ValueError(
                f"The settings must be a {cls.__name__}, got {settings!r:.80}; give its fields as keyword arguments."
            )
        given = {name: kwargs.pop(name) for name in cls.known if name in kwargs}
        for name in kwargs.keys() - {"token"}:  # the hub's, which is no misspelt `tokens`
            if difflib.get_close_matches(name, cls.field_names(), n=1, cutoff=0.75):
                raise ValueError(unknown_name("argument", name, cls.field_names()))
        own: dict[str, Any] = {}
        if settings is not None:  # but for what a preset filled in, and for what is given in another way now
            left_out = settings._preset()
            if any(given.get(name) is not None for name in cls.one_of):
                left_out = {**left_out, **{name: getattr(settings, name) for name in cls.one_of}}
            own = {name: value for name, value in settings.to_dict().items() if value != left_out.get(name)}
        return cls.from_kwargs(**own | given)


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


def naming(settings: type[Settings]) -> Callable[[Function], Function]:
    """Decorator: in place of `{settings}` in a function's docstring come the names of all fields."""

    def decorate(function: Function) -> Function:
        lines = (function.__doc__ or "").split("\n")
        for number, line in enumerate(lines):
            if "{settings}" in line:
                line = line.replace("{settings}", ", ".join(f"``{name}``" for name in settings.known))
                indent = line[: -len(line.lstrip())]
                lines[number] = textwrap.fill(line, 116, subsequent_indent=indent)
        function.__doc__ = "\n".join(lines)
        return function

    return decorate


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """One sentence that says that `name` is no known `kind`, with the nearest one if there is one."""
    nearest = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(known) if len(known) <= _MOST_LISTED else f"{', '.join(known[:_MOST_LISTED])}, ..."
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {listed}."
    return f"Unknown {kind} {name!r:.80}; {hint}"


def _finite(value: object) -> float | None:
    """A finite number as a float, one of numpy's too; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float comes near
        return None
