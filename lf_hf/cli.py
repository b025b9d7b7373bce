"""The command line, `lf-hf`: each command is a thin shell over one function of the library."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lf_hf
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.weights import weights_size
from lf_hf.healing.settings import HealSettings
from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table
from lf_hf.runtime.checked_json import parse_json
from lf_hf.runtime.fields import Settings
from lf_hf.runtime.launch import OtherProcessError, local_rank, rank
from lf_hf.settings import LEVELS, METHODS, FusionConfig

Command = TypeVar("Command", bound=Callable[..., Any])

_GUIDE = """\b
Examples:
  lf-hf fuse path/to/model out --num-fusions 4 --method refit
  lf-hf heal out healed --base path/to/model --text my_text.txt
  lf-hf sweep path/to/model results --num-fusions 1,4 --methods neural_alignment,refit
  lf-hf report out
  lf-hf tasks

\b
Start with a dry run, which says what a fusion does and takes, and writes nothing:
  lf-hf fuse path/to/model out --num-fusions 4 --dry-run
"""
_MECHANICS = [name for name in FusionConfig.known if name not in (*LEVELS, "method")]  # which a method has defaults of
_WIDEST = 10_000  # columns of a table that goes to a file
_TRACEBACK = "--traceback"
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
_INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lf-hf`. Returns 0, 1 after a failure, 2 for a wrong command line, or 130 when interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [argument for argument in given if argument != _TRACEBACK]
    # Base says in a sentence what transformers says in these and in a table.
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    for name in ("configuration_utils", "modeling_rope_utils"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that an old terminal cannot show is no failure
        sys.stdout.reconfigure(errors="replace")
    try:
        return int(app.main(arguments or ["--help"], prog_name="lf-hf", standalone_mode=False) or 0)
    except (KeyboardInterrupt, click.Abort):
        print("lf-hf: interrupted.", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if _TRACEBACK in given:
            raise
        if isinstance(error, OtherProcessError) or (local_rank() and rank() is None):
            return 1  # another process says it, or found the same before this one met it
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if not isinstance(error, (ValueError, OSError, click.ClickException)):
            message = f"{type(error).__name__}: {message} (run it again with {_TRACEBACK} to see where)"
        print(f"lf-hf: {' '.join(message.split())}", file=sys.stderr)
        return 2 if isinstance(error, click.ClickException) else 1


@click.group(epilog=_GUIDE, context_settings=_CONTEXT)
@click.version_option(lf_hf.__version__, message="lf-hf %(version)s")
@click.option(_TRACEBACK, is_flag=True, help="Show where an error came from; works after a command, too.")
def app(traceback: bool) -> None:  # which `main` takes out, wherever it is
    """Make a language model smaller by fusing decoder layers that follow each other."""


def _examples(*commands: str) -> str:
    # The first character keeps click from joining the lines.
    return "\n".join(["\b", "Examples:", *(f"  lf-hf {command}" for command in commands)])


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator; help shows them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _setting_options(settings: type[Settings], *names: str) -> Callable[[Command], Command]:
    """An option for each field of settings, or for some; None where it is not used. Settings read and check values."""
    options = []
    for field in (settings.known[name] for name in names or settings.known):
        name = "--" + field.name.replace("_", "-")
        metavar = "|".join(field.choices) or {int: "INTEGER", float: "FLOAT"}.get(field.kind)
        default = field.unset if field.default is None else field.default
        help = field.help if default == "" else f"{field.help}  [default: {default}]"
        declared = f"{name}/--no-{name[2:]}" if field.kind is bool else name
        options.append(click.option(declared, default=None, help=help, metavar=metavar))
    return _options(*options)


_BASE = click.argument("base")
_CALIBRATION = click.option(
    "--calibration",
    metavar="FILE",
    help="Calibration text: .txt, .jsonl, .csv or .parquet, with a field text, or messages of chats; or "
    "NAME[:CONFIG[:SPLIT[:COLUMN]]] of a data set on the hub, which is streamed; or bundled: what is installed.",
)
_OF_BASE = _options(
    click.option("--gguf-file", metavar="NAME", help="GGUF file in BASE; it is dequantised when it is read."),
    click.option("--revision", metavar="REF", help="Branch, tag or commit of BASE on the hub."),
)
_LOADING = _options(
    _OF_BASE,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16", "float64", "auto"]),
        help="What weights are computed in.  [default: as BASE has it]",
    ),
    click.option(
        "--device", "device_map", metavar="DEVICE", help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: cpu]"
    ),
)
_DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Only say what would be done, and what it would take. Writes nothing."
)


@app.command(
    epilog=_examples(
        "fuse meta-llama/Meta-Llama-3-8B out --target-layers 28 --method refit --calibration my_text.txt",
        "fuse path/to/Meta-Llama-3-8B out --num-fusions 4 --low-memory --plain",
        "fuse path/to/Meta-Llama-3-70B out --target-layers 70 --method refit --low-memory --device cuda",
        "fuse path/to/Meta-Llama-3-8B out --num-fusions 4 --dry-run",
    )
)
@_BASE
@click.argument("out")
@_setting_options(FusionConfig, "num_fusions")
@click.option("--target-layers", type=int, help="How many layers to leave, in place of --num-fusions.")
@_setting_options(FusionConfig, *LEVELS[1:], "method")
@_CALIBRATION
@_LOADING
@click.option(
    "--plain", "--as-llama", is_flag=True, help="Write a plain checkpoint, as BASE is, which opens without lf_hf."
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="Hold two layers, or one group, in memory instead of the model; with --device in that of the device.",
)
@_DRY_RUN
@_setting_options(FusionConfig, *_MECHANICS)
def fuse(
    base: str, out: str, target_layers: int | None, plain: bool, low_memory: bool, dry_run: bool, **given: Any
) -> None:
    """Fuse layers of BASE and write the smaller model to OUT.

    Ends with a table: layers, parameters, size on disk, and perplexity before and after; and on the same texts how far
    predictions of the next token are from the base's: KL divergence in nats a token, and how often the most likely
    token is the same.
    """
    from lf_hf.estimate import check_disk, plan_fusion

    settings, given = _taken(FusionConfig, given)
    if sum(name in settings for name in LEVELS) + (target_layers is not None) != 1:
        raise click.UsageError(
            "give one of --num-fusions, --target-layers, --max-divergence and --max-perplexity-ratio."
        )
    if target_layers is not None:
        settings["num_fusions"] = 1  # until the base says how many
    with _usage_errors():
        config = FusionConfig.from_kwargs(**settings)
    calibration, opened = given.pop("calibration", None), Base.open(base, given)
    if target_layers is not None:
        layers = opened.config.num_hidden_layers
        if not 1 <= target_layers < layers:
            raise click.UsageError(
                f"--target-layers must be 1 to {layers - 1} for a base of {layers} layers, got {target_layers}."
            )
        config = dataclasses.replace(config, num_fusions=layers - target_layers)
    if dry_run:
        plan = plan_fusion(opened, config, out=out, low_memory=low_memory, calibration=calibration)
        if not rank():  # of a launch: the first one speaks
            print(plan.summary())
        return
    check_disk(opened, config, out)
    with _without_warnings("lf_hf.pipeline", "lf_hf.healing.judge"):  # their notes stand below the table
        report = lf_hf.fuse_checkpoint(opened, out, config, low_memory=low_memory, plain=plain, calibration=calibration)
    if rank():  # of a launch: the first one speaks
        return
    sizes = sum(file.stat().st_size for file in opened.files()), weights_size(Path(out))
    budget = [report.budget.summary()] if report.budget else []
    _print(_table(out, *as_table(report.rows(sizes))), *budget, *report.notes)


@app.command(
    epilog=_examples(
        "heal out healed --base meta-llama/Meta-Llama-3-8B --text my_text.txt",
        "heal out healed --base path/to/model --tokens 1000000 --arg gradient_checkpointing=true",
    )
)
@click.argument("fused")
@click.argument("out")
@click.option(
    "--base",
    metavar="BASE",
    help="Folder or hub name of the checkpoint that was fused.  [default: what FUSED names, if that is on the hub]",
)
@click.option(
    "--text", metavar="FILE", help="Text to heal on, as `lf-hf fuse --calibration`.  [default: general or bundled]"
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Write BASE's predictions into this folder, for any number of healings of models made of it.",
)
@click.option(
    "--arg", metavar="NAME=VALUE", multiple=True, help="A field of transformers' TrainingArguments; may be repeated."
)
@_OF_BASE
@_DRY_RUN
@_setting_options(HealSettings)
def heal(fused: str, out: str, arg: tuple[str, ...], dry_run: bool, **given: Any) -> None:
    """Train FUSED to predict what its base predicts, and write it to OUT.

    Keeps the state that is nearest to the base on held-out text. When it was interrupted, the same command goes on
    where it stopped. Started by `accelerate launch -m lf_hf heal ...`, it uses all devices of the launch. Ends with a
    table: perplexity, divergence from the base, and how often both models expect the same token.
    """
    from lf_hf.healing.trainer import parse_training_arguments

    settings, given = _taken(HealSettings, given)
    with _usage_errors():
        given["settings"] = HealSettings.from_kwargs(**settings)
        given["training_args"] = parse_training_arguments(arg)
    if dry_run:
        from lf_hf.estimate import plan_heal

        plan = plan_heal(fused, out, **given)
        if not rank():
            print(plan.summary())
        return
    with _without_warnings("lf_hf.healing.judge"):  # its notes stand below the table
        report = lf_hf.heal(fused, out, **given)
    assert report.healed is not None
    if rank():  # of a launch: the first one speaks
        return
    teacher = f"The base's predictions were {report.healed.teacher}."
    _print(_table(out, *as_table(report.rows())), report.healed.summary(), teacher, *report.notes)


@app.command(
    epilog=_examples(
        "sweep meta-llama/Meta-Llama-3-8B results --num-fusions 1,4,11,13,15 --methods neural_alignment,mka,refit \\\n"
        "      --tasks mmlu_5shot --dtype bfloat16 --device cuda",
        "sweep path/to/model results --num-fusions 1,4 --methods mka,truncate --tasks mmlu_sample --limit 1",
    )
)
@_BASE
@click.argument("out", metavar="OUTDIR")
@click.option("--num-fusions", metavar="N,N,...", required=True, help="How many pairs of layers to fuse: one or more.")
@click.option(
    "--methods", metavar="METHOD,...", default="neural_alignment,mka", help=f"One or more of {', '.join(METHODS)}."
)
@click.option(
    "--tasks",
    metavar="TASK,...",
    default="mmlu_5shot",
    help="Tasks of lm-eval, and mmlu_5shot and mmlu_sample of lf_hf.",
)
@click.option(
    "--limit", type=float, help="How many questions of each task, or, below 1, what share of them.  [default: all]"
)
@click.option("--num-fewshot", type=int, help="Examples before each question.  [default: the task's own]")
@click.option("--batch-size", metavar="N|auto", default="1", help="How many questions to run together.")
@click.option("--metadata", metavar="JSON", help='Passed on to the tasks, such as {"mmlu_dir": "DIR"}.')
@_CALIBRATION
@click.option(
    "--heal-cache",
    metavar="DIR",
    help="With --heal-tokens: write BASE's predictions into this folder once, for all points, as heal --cache.",
)
@_LOADING
@_setting_options(FusionConfig, *_MECHANICS)
def sweep(base: str, out: str, num_fusions: str, methods: str, tasks: str, metadata: str | None, **given: Any) -> None:
    """Fuse BASE by several methods to several sizes, and evaluate all.

    Writes each result to OUTDIR/results.jsonl as soon as it is there: an interrupted sweep goes on where it stopped
    when the command is run again, and the processes of a launch share the work. Writes tables as results.csv and
    results.md, and a plot as curve.png and curve.svg. Ends with two tables: the results, and how stable each method is.
    """
    from lf_hf.evaluate.points import check_evaluation
    from lf_hf.evaluate.sweep import sweep as run_sweep
    from lf_hf.evaluate.tables import STABILITY_HEAD, STABILITY_NOTE, results_rows, stability_rows
    from lf_hf.report.page import missing_plot_packages

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # which else tells how it builds each task
    settings, given = _taken(FusionConfig, given)
    given |= {"num_fusions": _names(num_fusions), "methods": _names(methods), "tasks": _names(tasks)}
    with _usage_errors():
        values = None if metadata is None else parse_json(metadata, "--metadata")
        check_evaluation(given.get("limit"), given["batch_size"])
        for level, method in itertools.product(given["num_fusions"], given["methods"]):
            FusionConfig.from_kwargs(num_fusions=level, method=method, **settings)
    points = run_sweep(base, out, metadata=values, settings=settings, **given)
    if local_rank():  # of a launch: the first one on a machine speaks
        return
    head, *rows = results_rows(points)
    steady = stability_rows(points)
    below: list[Table | str] = [_table("Stability", STABILITY_HEAD, steady), STABILITY_NOTE] if steady else []
    _print(_table(base, head, rows), *below, *filter(None, [missing_plot_packages()]))


@app.command(epilog=_examples("report out --html out.html", "report out --png pictures"))
@click.argument("folder", metavar="DIR")
@click.option("--html", metavar="FILE", help="Where to write the page.  [default: DIR/fusion_report.html]")
@click.option("--png", metavar="DIR", help="Also write the pictures into this folder.")
def report(folder: str, html: str | None, png: str | None) -> None:
    """Make a page of pictures about the fused checkpoint in DIR.

    The page, with explanations, is a single file that needs no network.
    """
    from lf_hf.report.page import write_page, write_pictures

    loaded, place = FusionReport.load(folder), Path(folder)
    page = Path(html) if html else (place if place.is_dir() else place.parent) / "fusion_report.html"
    pictures = write_pictures(loaded, png) if png else []
    write_page(loaded, page)
    print(page, *pictures, sep="\n")


@app.command()
def tasks() -> None:
    """Print the folder of lf_hf's tasks, for lm-eval's --include_path."""
    print(lf_hf.tasks_path())


@contextmanager
def _without_warnings(*names: str) -> Iterator[None]:
    """Keep loggers to errors."""
    with ExitStack() as stack:
        for logger in map(logging.getLogger, names):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Settings that are refused are a wrong command line, not a failure."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _taken(settings: type[Settings], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of settings, and all other arguments, that were used on the command line."""
    used = {name: value for name, value in given.items() if value is not None}
    return {name: used.pop(name) for name in settings.known if name in used}, used


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table in which only heads wrap."""
    name = Text(title, "table.title", no_wrap=True, overflow="ignore")
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
    for number, (column, *cells) in enumerate(zip(head, *rows, strict=True)):
        width = max(map(len, [*column.split(), *cells]))
        table.add_column(Text(column), justify="right" if number else "left", min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print(*parts: Table | str) -> None:
    console = Console(highlight=False)
    shown = console.width if console.is_terminal else _WIDEST
    for part in parts:
        if isinstance(part, Table):
            console.width = _WIDEST
            console.width = max(shown, console.measure(part).minimum)
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
