"""The command line, `lf-hf`: each command is a thin shell over one function of the library."""

from __future__ import annotations

import ast
import io
import itertools
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click

import lf_hf
from lf_hf.checkpoint.base import DTYPES, Base
from lf_hf.checkpoint.weights import weights_size
from lf_hf.pipeline.fusion import FusionInputs
from lf_hf.pipeline.healing import HealInputs
from lf_hf.report.report import PAGE_NAME, FusionReport
from lf_hf.report.rows import as_table
from lf_hf.runtime.launch import OtherProcessError, local_rank, rank, speaks
from lf_hf.runtime.settings_base import Settings
from lf_hf.runtime.terminal import Command, as_options, options, setting_options, show, table
from lf_hf.settings import LEVELS, METHODS, FusionConfig, HealSettings

_GUIDE = """\b
Examples:
  lf-hf fuse path/to/model out --num-fusions 4
  lf-hf heal out healed --base path/to/model --text my_text.txt
  lf-hf sweep path/to/model results --num-fusions 1,4
  lf-hf report out
  lf-hf tasks

\b
Start with a dry run, which says what a fusion does and takes, and writes nothing:
  lf-hf fuse path/to/model out --num-fusions 4 --dry-run
"""
_MECHANICS = [name for name in FusionConfig.known if name not in (*LEVELS, "method")]  # all but the level and method
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
_TRACEBACK = "--traceback"
_INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lf-hf`. Returns 0, 1 after a failure, 2 for a wrong command line, or 130 when interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if word != _TRACEBACK]
    _quieten_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that an old terminal cannot show is no failure
        sys.stdout.reconfigure(errors="replace")
    try:
        return app.main(words or ["--help"], prog_name="lf-hf", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.Abort):
        print("lf-hf: interrupted.", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if _TRACEBACK in given:
            raise
        if isinstance(error, OtherProcessError) or (local_rank() and rank() is None):
            return 1  # another process says it, or found the same before this one met it
        command = next(filter(None, map(app.commands.get, words)), app)
        print(f"lf-hf: {as_options(_message(error), command.params)}", file=sys.stderr)
        return 2 if isinstance(error, click.ClickException) else 1


def _quieten_libraries() -> None:
    # Base says in a sentence what transformers says in these and in a table.
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    for name in ("transformers.configuration_utils", "transformers.modeling_rope_utils", "datasets", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _message(error: Exception) -> str:
    """What an error says, on one line."""
    message = str(error)
    if isinstance(error, click.ClickException):
        message = error.format_message()
    elif not isinstance(error, (ValueError, OSError)):
        message = f"{type(error).__name__}: {error} (run it again with {_TRACEBACK} to see where)"
    return " ".join(message.split())


def _with_options(text: str) -> str:
    """A text of the library, which names arguments, in the words of the command that runs."""
    return as_options(text, click.get_current_context().command.params)


@click.group(epilog=_GUIDE, context_settings=_CONTEXT)
@click.version_option(lf_hf.__version__, message="lf-hf %(version)s")
@click.option(_TRACEBACK, is_flag=True, help="Show where an error came from; works after a command, too.")
def app(traceback: bool) -> None:  # which `main` takes out, wherever it is
    """Make a language model smaller by fusing adjacent decoder layers."""


app.command_class = Command


def _examples(*commands: str) -> str:
    # The first character keeps click from joining the lines.
    return "\n".join(["\b", "Examples:", *(f"  lf-hf {command}" for command in commands)])


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_LIST: dict[str, Any] = {"metavar": "A,B,...", "type": _names}
_BASE = click.argument("base")
_CALIBRATION = click.option(
    "--calibration",
    metavar="FILE",
    help="Calibration text: .txt, .jsonl, .csv or .parquet, with a field text, or messages of chats; or "
    "NAME[:CONFIG[:SPLIT[:COLUMN]]] of a data set on the hub, which is streamed.  [default: bundled text]",
)
_DTYPE = click.Choice([*DTYPES, "auto"])
_HUB = click.option("--revision", metavar="REF", help="Branch, tag or commit of BASE on the hub.")
_MAX_MEMORY = click.option(
    "--max-memory",
    metavar="PLACES",
    help="How much memory may be used at each place, such as cpu=2GiB, or cuda:0=20GiB,cpu=30GiB.",
)
_LOADING = options(
    _HUB,
    click.option("--dtype", type=_DTYPE, help="Type of the weights.  [default: as BASE has it]"),
    click.option("--device", "device_map", help="cpu, cuda, cuda:1, or auto for all.  [default: a GPU if any]"),
    _MAX_MEMORY,
)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a result in OUT, if it is as lf_hf wrote it.")
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be done, and what it would take; do nothing.")


@app.command(
    epilog=_examples(
        "fuse path/to/model out --num-fusions 4 --dry-run",
        "fuse path/to/model out --target-layers 28 --calibration my_text.txt",
        "fuse path/to/Meta-Llama-3-70B out --target-layers 70 --method refit --max-memory cpu=60GiB",
    )
)
@_BASE
@click.argument("out")
@setting_options(FusionConfig, *LEVELS, "method", method="healed")
@_CALIBRATION
@_LOADING
@_OVERWRITE
@_DRY_RUN
@setting_options(FusionConfig, *_MECHANICS)
def fuse(base: str, out: str, overwrite: bool, dry_run: bool, **given: Any) -> None:
    """Fuse layers of BASE and write the smaller model to OUT.

    Ends with a table of layers, parameters and size on disk, and of figures on two texts, before and after: perplexity,
    divergence of predictions from the base's in nats a token, and others.
    """
    settings, others = _split(FusionConfig, given)
    calibration = others.pop("calibration", None)
    with _usage_errors():
        config = FusionConfig(**settings)
    opened = Base.open(base, others)
    if dry_run:
        from lf_hf.pipeline.dry_run import plan_fusion

        inputs = FusionInputs.open(opened, config, calibration, None, {})
        show(_with_options(plan_fusion(inputs, out, overwrite=overwrite).summary()))
        return
    # Their notes stand below the table.
    with _without_warnings("lf_hf.measure.dense", "lf_hf.pipeline.run", "lf_hf.healing.result"):
        report = lf_hf.fuse_checkpoint(opened, out, config, overwrite=overwrite, calibration=calibration)
    if not speaks():
        return
    base_size = sum(file.stat().st_size for file in opened.files())
    show(table(out, *as_table(report.rows((base_size, weights_size(Path(out)))))))
    if report.budget:
        show(_with_options(report.budget.summary()))
    show(*map(_with_options, report.all_notes), *_next_commands(out))


def _next_commands(out: str) -> list[str]:
    """What to type next, for a result in a folder."""
    folder = shlex.quote(out)
    return [
        f"Talk to it: transformers serve {folder}, and in another terminal: transformers chat {folder}",
        f"Serve it: vllm serve {folder}; or quantise it, by the commands of docs/recipes.md",
        f"See what was fused: lf-hf report {folder}",
    ]


@app.command(
    epilog=_examples(
        "heal out healed --base meta-llama/Meta-Llama-3-8B --text my_text.txt",
        "heal out healed --base path/to/model --tokens 1000000 --arg gradient_checkpointing=true",
    )
)
@click.argument("fused")
@click.argument("out")
@click.option(
    "--base", metavar="BASE", help="The model that was fused.  [default: FUSED names it, if it is on the hub]"
)
@click.option("--text", metavar="FILE", help="Text to heal on, as fuse --calibration.  [default: bundled text]")
@click.option("--arg", metavar="NAME=VALUE", multiple=True, help="A field of TrainingArguments; may be repeated.")
@_HUB
@_MAX_MEMORY
@_OVERWRITE
@_DRY_RUN
@setting_options(HealSettings)
def heal(fused: str, out: str, arg: tuple[str, ...], overwrite: bool, dry_run: bool, **given: Any) -> None:
    """Train FUSED to predict what its base predicts, and write it to OUT.

    Keeps the state that is nearest to the base on held-out text. When it was interrupted, the same command goes on
    where it stopped. Started by `accelerate launch -m lf_hf heal ...`, it uses all devices of the launch. Ends with a
    table: perplexity, divergence from the base, and others.
    """
    settings, others = _split(HealSettings, given)
    with _usage_errors():
        healing, training_args = HealSettings(**settings), parse_training_arguments(arg)
    base, text = others.pop("base", None), others.pop("text", None)
    if dry_run:
        from lf_hf.pipeline.dry_run import plan_heal

        inputs = HealInputs.open(fused, base, text, healing, training_args, others)
        show(_with_options(plan_heal(inputs, out, overwrite=overwrite).summary()))
        return
    with _without_warnings("lf_hf.healing.result"):  # its notes stand below the table
        places: dict[str, Any] = {"base": base, "text": text, "overwrite": overwrite}
        report = lf_hf.heal(fused, out, **places, settings=healing, training_args=training_args, **others)
    assert report.healed is not None
    show(table(out, *as_table(report.rows())), report.healed.summary())
    show(*map(_with_options, report.all_notes), *_next_commands(out))


@app.command(
    epilog=_examples(
        "sweep meta-llama/Meta-Llama-3-8B results --num-fusions 1,4,11,13 --methods neural_alignment,mka,refit \\\n"
        "      --tasks mmlu_5shot --dtype bfloat16 --device cuda",
        "sweep path/to/model results --num-fusions 1,4 --tasks mmlu_sample --limit 1",
    )
)
@_BASE
@click.argument("out", metavar="OUTDIR")
@click.option("--num-fusions", **_LIST, required=True, help="How many times two layers become one, for each fusion.")
@click.option("--methods", **_LIST, default="refit,healed", help=f"Some of {', '.join(METHODS)}.")
@click.option(
    "--tasks",
    **_LIST,
    default="mmlu_5shot",
    help="Tasks of lm-eval, and lf_hf's depth_pruning, mmlu_5shot and mmlu_sample.",
)
@click.option("--limit", type=float, help="How many questions of each task; below 1, their share.  [default: all]")
@click.option("--num-fewshot", type=int, help="Examples before each question.  [default: the task's own]")
@click.option(
    "--batch-size", metavar="N|auto", help="How many questions to run together.  [default: auto on a GPU, else 1]"
)
@click.option("--metadata", metavar="JSON", type=_json_object, help='For the tasks, such as {"mmlu_dir": "DIR"}.')
@_CALIBRATION
@_LOADING
@setting_options(FusionConfig, *_MECHANICS)
def sweep(base: str, out: str, **given: Any) -> None:
    """Fuse BASE by several methods to several sizes, and evaluate all.

    Writes each result to OUTDIR/results.jsonl as soon as it is there: an interrupted sweep goes on where it stopped
    when the command is run again. Writes the tables as results.md, and a plot as curve.png and curve.svg.
    Ends with two tables: the results, and how stable each method is.
    """
    from lf_hf.evaluate.sweep import sweep as run_sweep
    from lf_hf.evaluate.tables import STABILITY_HEAD, STABILITY_NOTE, results_rows, stability_rows
    from lf_hf.report.page import missing_plot_packages

    levels = given.pop("num_fusions")
    settings, others = _split(FusionConfig, given)
    with _usage_errors():
        for level, method in itertools.product(levels, others["methods"]):
            FusionConfig(level, method, **settings)
    points = run_sweep(base, out, num_fusions=levels, settings=settings, **others)
    head, *rows = results_rows(points)
    show(table(base, head, rows))
    stability = stability_rows(points)
    if stability:
        show(table("Stability", STABILITY_HEAD, stability), STABILITY_NOTE)
    missing = missing_plot_packages()
    if missing:
        show(missing)


@app.command(epilog=_examples("report out --html out.html", "report out --png pictures"))
@click.argument("folder", metavar="DIR")
@click.option("--html", metavar="FILE", help="Where to write the page.  [default: DIR/fusion_report.html]")
@click.option("--png", metavar="DIR", help="Also write the pictures into this folder.")
def report(folder: str, html: str | None, png: str | None) -> None:
    """Make a page of pictures about the fused checkpoint in DIR.

    The page, with explanations, is a single file that needs no network.
    """
    from lf_hf.report.page import write_page, write_pictures

    loaded = FusionReport.load(folder)
    place = Path(folder)
    if place.is_file():
        place = place.parent
    page = Path(html or place / PAGE_NAME)
    pictures = write_pictures(loaded, png) if png else []
    write_page(loaded, page)
    show(*map(str, (page, *pictures)))


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


def _split(settings: type[Settings], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of settings, and all other arguments, that were used on the command line."""
    used = {name: value for name, value in given.items() if value is not None}
    fields = {name: used.pop(name) for name in settings.known if name in used}
    return fields, used


def parse_training_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """TrainingArguments of a command line, each "name=value", the value as in JSON or Python, or a string."""
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"A training argument must be NAME=VALUE, got {pair!r:.80}.")
        given[name] = value
        for read in (ast.literal_eval, json.loads):
            with suppress(ValueError, SyntaxError):
                given[name] = read(value)
    return given
