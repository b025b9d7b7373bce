"""What a command line is made of: options from settings, help with headings, messages that name options, tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, TypeVar

import click
from pydantic.fields import FieldInfo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lf_hf.runtime.errors import explained
from lf_hf.runtime.launch import speaks
from lf_hf.runtime.settings_base import Settings, choices, kind, needs

Function = TypeVar("Function", bound=Callable[..., Any])

_METAVARS = {int: "INTEGER", float: "FLOAT"}
_WIDEST = 10_000  # columns of a table that goes to a file


class Command(click.Command):
    """A command whose help shows settings below their headings, and names options where settings name fields."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = self.get_params(ctx)
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in parameters:
            record = parameter.get_help_record(ctx)
            if record is None or isinstance(parameter, click.Argument):
                continue
            option, help = record
            heading = getattr(parameter, "heading", "") or "Options"
            sections.setdefault(heading, []).append((option, as_options(help, parameters)))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class SettingOption(click.Option):
    """An option with the heading of its setting."""

    def __init__(self, *arguments: Any, heading: str, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        self.heading = heading


def options(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options as one decorator; help shows them in this order."""
    return lambda function: reduce(lambda decorated, option: option(decorated), reversed(options), function)


def setting_options(settings: type[Settings], *names: str, **defaults: str) -> Callable[[Function], Function]:
    """An option for each of these fields of settings, or for all. Not used, it is its default here, or else None."""
    known = settings.known
    return options(*(_setting_option(name, known[name], defaults.get(name)) for name in names or known))


def _setting_option(name: str, field: FieldInfo, default: str | None) -> Callable[[Function], Function]:
    option = "--" + name.replace("_", "-")
    if kind(field) is bool:
        option += f"/--no-{option[2:]}"
    metavar = "|".join(choices(field)) or _METAVARS.get(kind(field))
    help = field.description or ""
    shown = field.default if default is None else default
    if shown is not None:
        help += f"  [default: {shown}]"
    heading = needs(field).heading
    return click.option(
        option, cls=SettingOption, default=default, show_default=False, help=help, metavar=metavar, heading=heading
    )


def as_options(text: str, parameters: Iterable[click.Parameter]) -> str:
    """A text that names arguments of functions, with options in their place: `num_fusions=3` is `--num-fusions 3`.

    Single words are replaced only where they cannot be words of English.
    """
    for parameter in parameters:
        if not isinstance(parameter, click.Option):
            continue
        option = max(parameter.opts, key=len)
        argument = rf"(?<![\w'/.-]){parameter.name}"
        end = r"(?![\w/]|\.\w)" if "_" in str(parameter.name) else r"(?= must be\b)"
        text = re.sub(rf"{argument}=True\b", option, text)
        text = re.sub(rf"{argument}= ?", f"{option} ", text)
        text = re.sub(rf"{argument}{end}", option, text)
    return text


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of which only the head wraps."""
    name = Text(title, "table.title", no_wrap=True, overflow="ignore")
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
    for number, (column, *cells) in enumerate(zip(head, *rows, strict=True)):
        width = max(map(len, [*column.split(), *cells]))
        table.add_column(Text(column), justify="right" if number else "left", min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def show(*parts: Table | str) -> None:
    """Print tables and lines, in the process that speaks for all of a launch. A table is never cut."""
    if not speaks():
        return
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDEST
    with explained("What was done cannot be printed", "all files are written", OSError):
        for part in parts:
            console.print(part, crop=False, soft_wrap=isinstance(part, str))
