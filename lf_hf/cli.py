"""The command line, `lf-hf`: each command is a thin shell over one function of the library."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import itertools
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import lf_hf
from lf_hf import fuse_checkpoint, tasks_path
from lf_hf.checkpoint.base import Base, checked_dtype
from lf_hf.checkpoint.saving import gone_if_empty
from lf_hf.checkpoint.weights import weights_size
from lf_hf.fuse import low_memory_device
from lf_hf.healing.settings import TRAIN, HealSettings
from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table
from lf_hf.runtime.checked_json import parse_json
from lf_hf.runtime.launch import OtherProcessError, local_rank, rank
from lf_hf.settings import CHOICES, LEVELS, FusionConfig

_GUIDE = """\b
Examples:
  lf-hf fuse path/to/model out --num-fusions 4 --method refit
  lf-hf plan path/to/model --calibration my_text.txt
  lf-hf heal out healed --base path/to/model --text my_text.txt
  lf-hf sweep path/to/model results --num-fusions 1,4 --methods neural_alignment,refit
  lf-hf report out
  lf-hf tasks

\b
Start with a dry run, which says what a fusion does and takes, and writes nothing:
  lf-hf fuse path/to/model out --num-fusions 4 --dry-run
"""

app = typer.Typer(
    help="Make a language model smaller by fusing pairs of its decoder layers.",
    epilog=_GUIDE,
    add_completion=False,
    rich_markup_mode=None,  # boxes would cut long option names off
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BAR = 30  # characters of the longest bar
_WIDTH = 160  # columns of notes that go to a file
_WIDEST = 10_000  # columns of a table
_TRACEBACK = "--traceback"
_INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended

BaseName = Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub name of a checkpoint.")]
CalibrationFile = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Calibration text: .txt, .jsonl, .csv or .parquet, with a field text, or messages of chats; or "
        "NAME[:CONFIG[:SPLIT[:COLUMN]]] of a data set on the hub, which is streamed.",
    ),
]
GgufFile = Annotated[
    str | None, typer.Option(metavar="NAME", help="GGUF file in BASE; it is dequantised when it is read.")
]
Revision = Annotated[str | None, typer.Option(metavar="REF", help="Branch, tag or commit of BASE on the hub.")]
Dtype = Annotated[
    str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.", show_default="as BASE has it")
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, or auto for all GPUs.", show_default="cpu")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lf-hf`. Returns 0, 1 after a failure, 2 for a wrong command line, or 130 when interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [argument for argument in given if argument != _TRACEBACK]
    # Base says in a sentence what transformers says in these and in a table.
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_load_report)
    for name in ("configuration_utils", "modeling_rope_utils"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that an old terminal cannot show is no failure
        sys.stdout.reconfigure(errors="replace")
    code = 0
    try:
        code = app(args=arguments or ["--help"], prog_name="lf-hf", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if _TRACEBACK in given:
            raise
        if isinstance(error, OtherProcessError) or (local_rank() and rank() is None):
            return 1  # another process says it, or found the same before this one met it
        # Of a command line that does not parse typer says itself how to put it.
        formatted: Callable[[], str] | None = getattr(error, "format_message", None)
        message = formatted() if formatted else str(error)
        if not isinstance(error, (ValueError, OSError)) and not formatted:
            message = f"{type(error).__name__}: {message} (run it again with {_TRACEBACK} to see where)"
        print(f"lf-hf: {' '.join(message.split())}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    if code == _INTERRUPTED:
        print("lf-hf: interrupted.", file=sys.stderr)
    return int(code)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _examples(*commands: str) -> str:
    # The first character keeps typer from joining the lines.
    return "\n".join(["\b", "Examples:", *(f"  lf-hf {command}" for command in commands)])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lf-hf {version('lf_hf')}")
        raise typer.Exit()


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    _traceback: Annotated[  # which `main` takes out, wherever it is
        bool, typer.Option(_TRACEBACK, help="Show where an error came from; works after a command, too.")
    ] = False,
) -> None:
    pass


def _setting_options(
    settings: type[FusionConfig] | type[HealSettings], leave_out: Collection[str] = (), **defaults: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of `settings`; it gets those that were used as `settings`.

    Names, types, help texts and defaults are the fields' own. Of `defaults`, it gets those too that were not used.
    """
    entries = re.findall(r"^(\w+) : (.+)\n((?:    .+\n?)+)", inspect.getdoc(settings) or "", re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, _, text in entries}
    # The settings read numbers themselves, and say better what is wrong with one.
    metavars = {"int": "INTEGER", "float": "FLOAT", "float | None": "FLOAT"}
    metavars |= {name: "|".join(choices) for name, choices in (CHOICES | {"train": TRAIN}).items()}
    absent = {"written_share": "from the text", "learning_rate": "from --train"} | dict.fromkeys(LEVELS, "none")
    options = []
    for field in dataclasses.fields(settings):
        if field.name in leave_out:
            continue
        required = field.default is dataclasses.MISSING
        default = "required" if required else defaults.get(field.name, str(field.default))
        if field.default is None:
            default = absent.get(field.name, "from --method")
        option = typer.Option(
            help=texts.get(field.name, ""),
            show_default=default,
            metavar=metavars.get(field.name, metavars.get(str(field.type))),
        )
        kind = bool if field.type == "bool" else str
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            given = {option.name: arguments.pop(option.name) for option in options}
            used = {name: value for name, value in given.items() if value is not None}
            command(**arguments, settings=defaults | used)

        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "settings"]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return with_options


@app.command(
    epilog=_examples(
        "fuse meta-llama/Meta-Llama-3-8B out --target-layers 28 --method refit --calibration my_text.txt",
        "fuse path/to/Meta-Llama-3-8B out --num-fusions 4 --low-memory --plain",
        "fuse path/to/Meta-Llama-3-70B out --target-layers 70 --method refit --low-memory --device cuda",
        "fuse path/to/Meta-Llama-3-8B out --num-fusions 4 --dry-run",
    )
)
@_setting_options(FusionConfig, leave_out=["num_fusions"])
def fuse(
    base: BaseName,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the fused checkpoint.")],
    *,
    settings: dict[str, Any],
    num_fusions: Annotated[
        str | None,
        typer.Option(
            metavar="INTEGER",
            help="How many pairs of layers to fuse; or give --target-layers, --max-divergence or "
            "--max-perplexity-ratio.",
        ),
    ] = None,
    target_layers: Annotated[int | None, typer.Option(help="How many layers to leave.")] = None,
    calibration: CalibrationFile = None,
    gguf_file: GgufFile = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", "--as-llama", help="Write a plain checkpoint, as BASE is, which opens without lf_hf."),
    ] = False,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Hold two layers, or one group, in memory instead of the model; with --device in that of the device.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done: layers, sizes, memory and time. Writes nothing."),
    ] = False,
) -> None:
    """Fuse layers of BASE and write the smaller model to OUT.

    Ends with a table: layers, parameters, size on disk, and perplexity before and after; and on the same texts how far
    predictions of the next token are from the base's: KL divergence in nats a token, and how often the most likely
    token is the same.
    """
    hub = _given(gguf_file=gguf_file, revision=revision)
    budgets = [settings.get(name) for name in LEVELS]
    if sum(level is not None for level in (num_fusions, target_layers, *budgets)) != 1:
        raise typer.BadParameter(
            "give one of --num-fusions, --target-layers, --max-divergence and --max-perplexity-ratio."
        )
    if target_layers is not None:
        num_fusions = str(_num_fusions(Base.open(base, hub), target_layers))
    with _usage_errors():
        checked_dtype(dtype)
        config = FusionConfig.from_kwargs(**settings | _given(num_fusions=num_fusions))
    loading = hub | _given(dtype=dtype, device_map=device)
    from lf_hf.estimate import check_disk, plan_fusion

    if dry_run:
        plan = plan_fusion(base, config, out=out, low_memory=low_memory, calibration=calibration, **loading)
        print(plan.summary())
        return
    if low_memory:
        low_memory_device(loading)
    opened = Base.open(base, loading)
    check_disk(opened, config, out)
    with _without_warnings("lf_hf.pipeline"), _without_warnings("lf_hf.healing.outcome"):  # notes stand below the table
        done = fuse_checkpoint(opened, out, config, low_memory=low_memory, plain=plain, calibration=calibration)
    if rank():  # of a launch: the first one speaks
        return
    before, after = weights_size(base, hub), weights_size(out, {})
    budget = [done.budget.summary()] if done.budget else []
    _print(_table(out, *as_table(done.rows((before, after)))), *budget, *done.notes)


@app.command(
    epilog=_examples(
        "plan path/to/model --calibration my_text.txt",
        "plan path/to/Meta-Llama-3-8B --low-memory --device cuda",
    )
)
@_setting_options(FusionConfig, leave_out=[*LEVELS, "selection", "perplexity_tokens", "heal_tokens"], method="refit")
def plan(
    base: BaseName,
    *,
    settings: dict[str, Any],
    calibration: CalibrationFile = None,
    gguf_file: GgufFile = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Hold a group of layers in memory instead of the model.")
    ] = False,
) -> None:
    """Measure what groups of layers of BASE would cost as one layer each, and draw the curve. Writes nothing.

    For each number of layers fewer: the groups that cost least together, each as its first and last layer, and how far
    they are expected to move the predictions of the next token from BASE's, in nats a token. What a fusion costs as a
    whole is measured by `lf-hf fuse --max-divergence`.
    """
    with _usage_errors():
        checked_dtype(dtype)
        FusionConfig.from_kwargs(**settings, num_fusions=1)
    from lf_hf.estimate import cost_curve

    loading = _given(gguf_file=gguf_file, revision=revision, dtype=dtype, device_map=device)
    levels = cost_curve(base, low_memory=low_memory, calibration=calibration, settings=settings, **loading)
    if rank():  # of a launch: the first one speaks
        return
    longest = max(level.divergence for level in levels)
    rows = [
        [
            str(level.num_fusions),
            f"{level.divergence:.3f}",
            "#" * round(_BAR * level.divergence / longest),
            ", ".join(f"{first}-{last}" for first, last in level.groups),
        ]
        for level in levels
    ]
    _print(_table(base, ["layers fewer", "nats a token", "", "groups of layers"], rows, left=(2, 3)))


def _num_fusions(base: Base, target_layers: int) -> int:
    num_layers = base.config.num_hidden_layers
    if not 1 <= target_layers < num_layers:
        raise typer.BadParameter(
            f"--target-layers must be 1 to {num_layers - 1} for a base of {num_layers} layers, got {target_layers}."
        )
    return num_layers - target_layers


@app.command(
    epilog=_examples(
        "heal out healed --base meta-llama/Meta-Llama-3-8B --text my_text.txt",
        "heal out healed --base path/to/model --tokens 1000000 --arg gradient_checkpointing=true",
    )
)
@_setting_options(HealSettings)
def heal(
    fused: Annotated[str, typer.Argument(metavar="FUSED", help="Folder of a fused checkpoint.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the healed checkpoint.")],
    *,
    settings: dict[str, Any],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Folder or hub name of the checkpoint that was fused.",
            show_default="what FUSED names, if that is on the hub",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text to heal on, as --calibration of `lf-hf fuse` takes it.",
            show_default="a mixture that is there offline",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set on the hub in place of --text; it is streamed.")
    ] = None,
    dataset_config: Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of the data set.")] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the data set.")] = "train",
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of the data set that has the text, or chats.")
    ] = "text",
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write BASE's predictions into this folder, for any number of healings of models made of it.",
            show_default="no",
        ),
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A field of transformers' TrainingArguments; may be repeated."),
    ] = None,
    gguf_file: GgufFile = None,
    revision: Revision = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done: text, steps, memory and time. Writes nothing."),
    ] = False,
) -> None:
    """Train the fused model FUSED for a short time to predict what its base predicts, and write it to OUT.

    Keeps the state that is nearest to the base on text that was kept aside. When it was interrupted, the same command
    goes on where it stopped. Started by `accelerate launch -m lf_hf heal ...`, it uses all devices of the launch.
    Ends with a table: perplexity, divergence from the base, and how often both models expect the same token.
    """
    from lf_hf.healing.training import given_arguments

    with _usage_errors():
        chosen = HealSettings.from_kwargs(**settings)
        training = given_arguments(arg or [])
    asked: dict[str, Any] = {
        "base": base,
        "text": text,
        "dataset": dataset,
        "dataset_config": dataset_config,
        "dataset_split": split,
        "dataset_column": column,
        "settings": chosen,
        "cache": cache,
        "training_args": training,
        **_given(gguf_file=gguf_file, revision=revision),
    }
    if dry_run:
        from lf_hf.healing.plan import plan_heal

        said = plan_heal(fused, out, **asked).summary()
        if not rank():
            print(said)
        return
    with _without_warnings("lf_hf.healing.outcome"):  # its notes stand below the table
        done = lf_hf.heal(fused, out, **asked)
    assert done.healed is not None
    if rank():  # the first process of a launch says it for all
        return
    said = f"The base's predictions were {done.healed.teacher}."
    _print(_table(out, *as_table(done.rows())), done.healed.summary(), said, *done.notes)


@app.command(
    epilog=_examples(
        "sweep meta-llama/Meta-Llama-3-8B results --num-fusions 1,4,11,13,15 --methods neural_alignment,mka,refit \\\n"
        "      --tasks mmlu_5shot --dtype bfloat16 --device cuda",
        "sweep path/to/model results --num-fusions 1,4 --methods mka,truncate --tasks mmlu_sample --limit 1",
    )
)
@_setting_options(FusionConfig, leave_out=[*LEVELS, "method"])
def sweep(
    base: BaseName,
    out: Annotated[
        str,
        typer.Argument(metavar="OUTDIR", help="Folder for the results; those that it holds are not computed again."),
    ],
    *,
    settings: dict[str, Any],
    num_fusions: Annotated[
        str, typer.Option(metavar="N,N,...", help="How many pairs of layers to fuse: one or more numbers.")
    ],
    methods: Annotated[
        str, typer.Option(metavar="METHOD,...", help=f"One or more of {', '.join(CHOICES['method'])}.")
    ] = "neural_alignment,mka",
    tasks: Annotated[
        str, typer.Option(metavar="TASK,...", help="Tasks of lm-eval, and mmlu_5shot and mmlu_sample of lf_hf.")
    ] = "mmlu_5shot",
    limit: Annotated[
        float | None,
        typer.Option(help="How many questions of each task, or, below 1, what share of them.", show_default="all"),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.", show_default="the task's own")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="How many questions to run together.")] = "1",
    metadata: Annotated[
        str | None, typer.Option(metavar="JSON", help='Passed on to the tasks, such as {"mmlu_dir": "DIR"}.')
    ] = None,
    calibration: CalibrationFile = None,
    heal_cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="With --heal-tokens: write BASE's predictions into this folder once, for all points, as heal --cache.",
            show_default="no",
        ),
    ] = None,
    gguf_file: GgufFile = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Fuse BASE by several methods to several sizes, and evaluate all.

    Writes each result to results.jsonl as soon as it is there: an interrupted sweep goes on where it stopped when the
    command is run again, and processes that run it at the same time share the work. Writes tables as results.csv and
    results.md, and a plot as curve.png and curve.svg. Ends with two tables: the results, and how stable each method is.
    """
    from lf_hf.evaluate.sweep import check_evaluation
    from lf_hf.evaluate.sweep import sweep as run_sweep
    from lf_hf.evaluate.tables import STABILITY_HEAD, STABILITY_NOTE, results_rows, stability, stability_rows
    from lf_hf.report.page import missing_plot_packages

    _quiet_lm_eval()
    try:
        levels = [int(level) for level in num_fusions.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--num-fusions must be integers with commas between, got {num_fusions!r}.") from None
    with _usage_errors():
        values = None if metadata is None else parse_json(metadata, "--metadata")
        check_evaluation(limit, num_fewshot, batch_size, values)
        checked_dtype(dtype)
        for level, method in itertools.product(levels, _names(methods)):
            FusionConfig.from_kwargs(num_fusions=level, method=method, **settings)
    points = run_sweep(
        base,
        out,
        num_fusions=levels,
        methods=_names(methods),
        tasks=_names(tasks),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        metadata=values,
        calibration=calibration,
        heal_cache=heal_cache,
        settings=settings,
        **_given(gguf_file=gguf_file, revision=revision, dtype=dtype, device_map=device),
    )
    if local_rank():  # of a launch: the first one on a machine speaks
        return
    head, *rows = results_rows(points)
    steady = stability_rows(stability(points))
    below: list[Table | str] = [_table("Stability", STABILITY_HEAD, steady), STABILITY_NOTE] if steady else []
    _print(_table(base, head, rows), *below, *filter(None, [missing_plot_packages()]))


@app.command(epilog=_examples("report out --html out.html", "report out --png pictures"))
def report(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a fused checkpoint, or its report file.")],
    *,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where to write the page.", show_default="DIR/fusion_report.html"),
    ] = None,
    png: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also write the pictures into this folder.", show_default="no")
    ] = None,
) -> None:
    """Make a page of pictures and explanations about a fused checkpoint.

    The page is a single file that needs no network.
    """
    from lf_hf.report.page import write_page, write_pictures

    if "" in (folder, html, png):  # which Path would take for the current folder
        raise typer.BadParameter("a path is empty; '.' is the current folder.")
    found, place = FusionReport.load(folder), Path(folder)
    page = Path(html) if html else (place if place.is_dir() else place.parent) / "fusion_report.html"
    place_of_pictures = gone_if_empty(Path(png)) if png else nullcontext()  # made before the page is written
    with _writing(png, "--png"), place_of_pictures:
        with _writing(page, "--html"):
            write_page(found, page)
        pictures = write_pictures(found, png) if png else []
    for file in (page, *pictures):
        print(file)


@app.command()
def tasks() -> None:
    """Print the folder of lf_hf's tasks, for lm-eval's --include_path."""
    print(tasks_path())


def _quiet_lm_eval() -> None:
    """Keep lm-eval from telling how it builds each task, and from asking git and the system for what nobody is told."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with suppress(ImportError):
        from lm_eval import evaluator

        evaluator.get_git_commit_hash = lambda: None
        evaluator.add_env_info = lambda storage: None


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Keep a logger to errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Settings that FusionConfig refuses are a wrong command line, not a failure."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def _writing(place: str | Path | None, option: str) -> Iterator[None]:
    """Say of what cannot be written which option to change."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it was said
            raise
        raise OSError(f"{str(place)!r} cannot be written ({error.strerror}); give another place by {option}.") from None


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = frozenset([0])
) -> Table:
    """Numbers and names stay whole: cells wrap in a last column of words alone, heads and those at spaces."""
    rows, name = list(rows), Text(title, "table.title", no_wrap=True, overflow="ignore")
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(head):
        wraps = number in left and number == len(head) - 1
        cells = [row[number] for row in rows]
        whole = [*column.split(), *(" ".join(cells).split() if wraps else cells)]
        table.add_column(
            Text(column, no_wrap=False),
            justify="left" if number in left else "right",
            min_width=max(map(cell_len, whole), default=1),
            no_wrap=not wraps,
        )
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _print(*parts: Table | str) -> None:
    console = Console(highlight=False)
    shown = console.width if console.is_terminal else _WIDTH
    for part in parts:
        console.width = shown
        if isinstance(part, Table):
            console.width = _WIDEST
            if console.is_terminal and console.measure(part).maximum > shown:
                for column in part.columns:
                    column.width = column.min_width if column.no_wrap else None
                console.width = max(shown, console.measure(part).minimum)
        console.print(part, markup=False, crop=False)
