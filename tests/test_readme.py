"""What README.md, docs/ and research/ tell people to type works: on a tiny checkpoint in place of the 8B one."""

import inspect
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from builders import check_golden, make_report
from conftest import ROOT, make_texts
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from lf_hf import FusionConfig, tasks_path
from lf_hf.cli import app, main
from lf_hf.report.data import Continuation
from lf_hf.settings import LEVELS

FOLDERS = ROOT / "docs", ROOT / "research"
PAGES = [ROOT / "README.md"]
PAGES += [page for folder in FOLDERS for page in sorted(folder.glob("*.md")) if page.name != "api.md"]
OTHER_PROGRAMS = (
    "hf pip . export convert_hf_to_gguf.py llama-quantize llama-server transformers vllm".split()
)  # nothing is checked


def blocks(language: str, page: Path = PAGES[0]) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(pages: list[Path] = PAGES) -> Iterator[list[str]]:
    """Each command line of some pages, and those inside others, in words: without variables before and comments."""
    for block in itertools.chain(*(blocks("bash", page) for page in pages)):
        for line in block.replace("\\\n", " ").splitlines():
            for command in (line, *re.findall(r'"\$\((.*?)\)"', line)):
                words = shlex.split(command, comments=True)
                if words := list(itertools.dropwhile(re.compile(r"\w+=").match, words)):
                    yield words


def adapted(code: str, base: str) -> str:
    """The same with a tiny base, settings that fit it, and tasks that need no network."""
    code = code.replace("path/to/Meta-Llama-3-8B", base).replace("meta-llama/Meta-Llama-3-8B", base)
    code = code.replace("num_fusions=4", "num_fusions=2").replace("tokens=16384", "tokens=2048")
    code = code.replace('method="refit"', 'method="refit", calibration_tokens=1024, perplexity_tokens=512')
    return code.replace(",dtype=bfloat16", ",calibration_tokens=1024").replace("mmlu_5shot", "mmlu_sample_anatomy")


@pytest.fixture(autouse=True)
def folder_with_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_text.txt").write_text("\n\n".join(make_texts(400)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)], ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("python", page):
        exec(adapted(block, base), names)
    for saved in re.findall(r'save_pretrained\("(.*?)"', "".join(blocks("python", page))):
        assert (tmp_path / saved / "config.json").is_file()
    assert page.name != "README.md" or "layers: 5 -> 3" in capsys.readouterr().out


@pytest.mark.parametrize("block", [block for block in blocks("bash") if block.startswith("lm_eval")])
def test_lm_eval_blocks_run(
    block: str, base: str, run_lm_eval: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    _, *words = shlex.split(adapted(block, base).replace("\\\n", " "))
    run_lm_eval([str(tasks_path()) if "tasks_path" in word else word for word in words])
    assert "|anatomy" in capsys.readouterr().out.replace(" ", "")


# Whole cases of docs/recipes.md, by what they write, with the kinds of models that stand for theirs.
CASES = {"smaller": "llama", "chatting": "llama", "seeing": "qwen3_vl", "mixture": "qwen3_moe"}
TINY = "--num-fusions 1 --calibration-tokens 1024 --calibration-length 32 --perplexity-tokens 0 --no-speed".split()
HEAL = ["--heal-tokens", "1024"]


@pytest.mark.parametrize("out", CASES)
def test_a_whole_case_gives_a_model_that_opens(out: str, family_base: Callable[..., Path]) -> None:
    shutil.copytree(family_base(CASES[out]), "base")
    if out == "chatting":
        tokenizer = AutoTokenizer.from_pretrained("base")
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        tokenizer.save_pretrained("base")
        chats = [{"messages": [{"role": "user", "content": text}]} for text in make_texts(400)]
        Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    for program, command, *arguments in commands([ROOT / "docs" / "recipes.md"]):
        if program == "lf-hf" and command == "fuse" and arguments[1] == out:
            given = " ".join(arguments[1:]).replace("--target-layers 28", "").split()
            assert main([command, "base", *given, *TINY, *(() if "refit" in given else HEAL)]) == 0
        elif program == "lf-hf" and arguments == [out]:
            assert main([command, out]) == 0
    loader = AutoModelForImageTextToText if out == "seeing" else AutoModelForCausalLM
    base, fused = (loader.from_pretrained(folder) for folder in ("base", out))
    assert type(fused) is type(base) and fused.num_parameters() < base.num_parameters()


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_is_one_that_there_is(words: list[str]) -> None:
    program, *arguments = words
    if program == "lf-hf":
        check_lf_hf(arguments or ["--help"])  # as main does
    elif "lf_hf" in words:  # by a launcher
        check_lf_hf(words[words.index("lf_hf") + 1 :])
    elif "lm_eval" in words[:8]:  # by itself, or by a launcher
        args = simple_parse_args_string(arguments[arguments.index("--model_args") + 1])
        known = {*inspect.signature(HFLM.__init__).parameters, *FusionConfig.given_beside}
        assert set(args) <= known | set(FusionConfig.known)
    elif program.endswith("python"):
        assert arguments[0] == "-c" or (ROOT / arguments[0]).is_file()
    elif program not in OTHER_PROGRAMS:
        assert os.access(ROOT / program, os.X_OK)


def check_lf_hf(arguments: list[str]) -> None:
    """The options parse, and FusionConfig takes those that are its own."""
    try:
        with app.make_context("lf-hf", list(arguments)) as outer:
            name, command, rest = app.resolve_command(outer, arguments)
            assert command is not None
            params = command.make_context(name, rest, parent=outer).params
    except click.exceptions.Exit:  # --help has no more to say
        return
    settings = {name: params[name] for name in FusionConfig.known if params.get(name) is not None}
    if isinstance(settings.get("num_fusions"), list) or not settings.keys() & {*LEVELS, "num_fusions"}:
        settings["num_fusions"] = 1  # a sweep has several, and other commands none
    for method in params.get("methods") or [params.get("method") or "mka"]:
        FusionConfig(**settings | {"method": method})


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            file, _, heading = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists() and (not heading or heading in anchors(there)), target


def test_the_api_reference_is_that_of_the_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend("scripts")
    import api_reference

    page = api_reference.PAGE.read_text(encoding="utf-8")
    assert page == api_reference.reference(), "Run scripts/api_reference.py, and commit docs/api.md."


def write_results(folder: Path, accuracy: float) -> None:
    """What lm_eval writes about a group with one member, and about a group without a metric of its own."""
    values = {"alias": "-", "acc,none": accuracy, "acc_stderr,none": "N/A"}
    task = {"alias": "task", "sample_len": 3, "exact,none": 1, "exact_stderr,none": 0.5}
    written = {
        "results": {"group": values, "part": values, "bare": {" ": " ", "alias": "bare"}, "a": task},
        "group_subtasks": {"group": ["part"], "bare": ["a"]},
        "n-samples": {"part": {"effective": 2}, "a": {"effective": 1000}},
    }
    (folder / "of_lm_eval").mkdir(parents=True)
    (folder / "of_lm_eval" / "results_2026.json").write_text(json.dumps(written))


def test_models_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "results" / "dense", 0.25)
    for n, method in enumerate(("truncate", "refit")):
        said = [Continuation("Once upon", "a time", f"{method}\nit")]
        (tmp_path / method).mkdir()
        make_report(continuations=said).save(tmp_path / method)
        write_results(tmp_path / "results" / method, 0.5 + n / 4)
    monkeypatch.setenv("COLUMNS", "100")
    fused = [f"{method}={tmp_path / method}" for method in ("truncate", "refit")]
    monkeypatch.setattr("sys.argv", ["first_look.py", str(tmp_path / "results"), "--fused", *fused])
    runpy.run_path(f"{ROOT}/scripts/first_look.py", run_name="__main__")
    check_golden("first_look.txt", capsys.readouterr().out)


@pytest.mark.parametrize("argument", ["-o", "--output_path=out"])
def test_a_comparison_says_in_advance_that_it_needs_its_own_results(argument: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "BASE"}
    done = subprocess.run([ROOT / "scripts" / "quickstart", argument], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith(f"Without BASE, {argument} cannot be given")
