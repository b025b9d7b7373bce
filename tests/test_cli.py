"""The command line, and settings, which are its options. What they refuse is in test_bad_input.py."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, same
from transformers import AutoModelForCausalLM

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, HealSettings
from lf_hf.cli import main
from lf_hf.report.figures import FIGURES
from lf_hf.report.report import PAGE_NAME
from lf_hf.settings import METHODS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run lf-hf: exit code, stdout, stderr without progress bars."""
    monkeypatch.setenv("COLUMNS", "120")

    def run_main(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if line.startswith("lf-hf"))

    return run_main


def test_fuse_writes_what_the_library_writes_and_a_table(run: Run, base: str, text: Path, tmp_path: Path) -> None:
    code, out, err = run(
        *("fuse", base, tmp_path / "out", "--target-layers", 3, "--calibration", text),
        *("--method", "mka", "--ratio-beta", 0.5, "--no-rank-normalize", "--perplexity-tokens", 300),
    )
    assert code == 0 and err == ""
    config = FusionConfig(2, "mka", ratio_beta=0.5, rank_normalize=False, perplexity_tokens=300)
    wanted = FusedLlamaForCausalLM.from_pretrained_fused(base, config, calibration=text)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(written, wanted)
    report = FusionReport.load(tmp_path / "out")
    assert report.config == config.to_dict()
    sizes = [file.stat().st_size for folder in (base, tmp_path / "out") for file in Path(folder).glob("*.safetensors")]
    shown, rows = " ".join(out.split()), report.rows((sizes[0], sizes[1]))
    assert len(rows) == 3 + 2 * len(FIGURES) and all(" ".join(row.cells).strip() in shown for row in rows)
    *_, talk, serve, see = out.splitlines()
    assert f"transformers chat {tmp_path / 'out'}" in talk and f"vllm serve {tmp_path / 'out'};" in serve
    program, *words = shlex.split(see.partition(": ")[2])
    assert program == "lf-hf" and run(*words)[0] == 0 and (tmp_path / "out" / PAGE_NAME).is_file()


def test_one_command_fuses_within_a_budget_and_heals(run: Run, base: str, text: Path, tmp_path: Path) -> None:
    options = ("--heal-tokens", 1024, "--max-divergence", 9, "--calibration", text)
    short = ("--calibration-tokens", 1024, "--calibration-length", 64, "--perplexity-tokens", 300)
    code, out, _ = run("fuse", base, tmp_path / "out", *options, *short)
    report: Any = FusionReport.load(tmp_path / "out")
    assert code == 0 and report.healed.kept >= 0 and "healed" in out.split("layers")[0].split()
    assert report.budget.summary().replace("max_divergence=", "--max-divergence ") in out
    assert report.budget.allowed == 9 and report.layers_after < report.layers_before


def test_what_has_no_effect_is_said(run: Run, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = "--num-fusions 1 --method truncate --perplexity-tokens 0 --ridge 9 --calibration nowhere.txt".split()
    code, *_ = run("fuse", base, tmp_path / "out", *options)
    assert code == 0 and "Without effect on method='truncate': ridge, calibration." in caplog.text


def test_without_a_command_it_says_what_there_is(run: Run) -> None:
    code, out, err = run()
    assert code == 0 and err == "" and (code, out, err) == run("--help")
    for command in ("fuse", "heal", "sweep", "report", "tasks"):
        assert f"\n  {command} " in out and f"\n    lf-hf {command}" in out
    assert run("--version") == (0, f"lf-hf {version('lf_hf')}\n", "")
    assert run("tasks") == (0, f"{lf_hf.tasks_path()}\n", "")


def test_commands_heal_unless_told_otherwise(run: Run, base: str, text: Path, tmp_path: Path) -> None:
    """The published method, which ruins most models, stays the default in Python and for lm-eval."""
    words = ["fuse", base, tmp_path / "out", "--num-fusions", 1, "--calibration", text, "--dry-run"]
    code, out, _ = run(*words)
    assert code == 0 and f"Plan: {base} with healed, 1 fusion." in out
    assert f"Plan: {base} with mka, 1 fusion." in run(*words, "--method", "mka")[1]
    assert "[default: refit,healed]" in " ".join(run("sweep", "--help")[1].split())
    assert FusionConfig(1).method == "neural_alignment"


@pytest.mark.parametrize(("command", "settings"), [("fuse", FusionConfig), ("heal", HealSettings)])
def test_every_setting_is_an_option_with_its_default_and_help(run: Run, command: str, settings: Any) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and f"Examples:\n    lf-hf {command} " in out
    words = " ".join(out.split())
    of_commands = {"method": "healed"}
    for name, field in settings.known.items():
        default = of_commands.get(name, field.default)
        assert f"--{name.replace('_', '-')} " in words
        assert "_" not in name or not re.search(rf"\b{name}\b", words)
        assert default is None or f"[default: {default}]" in words
    general, *published = out.split("\nHyper-parameters of the published method:\n")
    assert "--kernel-scale" not in general and ["--ridge" in part for part in published] == [False] * len(published)


def test_an_unexpected_error_is_named(run: Run, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.fuse_checkpoint", Mock(side_effect=RuntimeError("out of\nmemory")))
    arguments = ["fuse", base, tmp_path / "out", "--num-fusions", 1]
    code, _, err = run(*arguments)
    assert code == 1 and err.startswith("lf-hf: RuntimeError: out of memory")
    for number in (0, 1, len(arguments)):
        with pytest.raises(RuntimeError):
            run(*arguments[:number], "--traceback", *arguments[number:])


def test_ctrl_c_gets_one_line_in_a_log_and_leaves_nothing(make_base: Callable[..., str], tmp_path: Path) -> None:
    base, out = make_base(num_hidden_layers=40), tmp_path / "out"  # so many that it takes some seconds
    arguments = ["fuse", base, str(out), "--num-fusions", "1", "--method", "mka", "--perplexity-tokens", "10000000"]
    process = installed_command(*arguments)
    while not out.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.endswith("lf-hf: interrupted.\n") and "Traceback" not in err
    assert "\r" not in err and "Perplexity before" not in err  # no bar, and no line in the first half minute
    assert list(tmp_path.iterdir()) == []


def installed_command(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    """Start what pip makes of the entry point in pyproject.toml, after some code of a test."""
    [entry] = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("lf-hf =")]
    module, name = entry.split('"')[1].split(":")
    # A shell lets what it starts in the background ignore SIGINT, and that is inherited.
    heeds = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heeds}\n{before}\nfrom {module} import {name}\nsys.exit({name}())", *arguments]
    environment, pipe = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, subprocess.PIPE
    return subprocess.Popen(command, text=True, env=environment, stdout=pipe, stderr=pipe)


def test_ctrl_c_while_importing_gets_one_line() -> None:
    interrupt = """
class Interrupt:
    def find_spec(self, name, *_):
        if name == "transformers":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())"""
    process = installed_command("tasks", before=interrupt)
    assert (*process.communicate(), process.returncode) == ("", "lf-hf: interrupted.\n", 130)


def test_defaults_are_the_published_hyper_parameters() -> None:
    config = FusionConfig(num_fusions=4)
    assert config.method == "neural_alignment"
    assert (config.kernel_scale, config.kernel_alpha, config.embedding_dim, config.ratio_beta) == (8, 0.5, 2, 1)
    assert (config.mi_neighbors, config.entropy_neighbors) == (5, 50)
    assert (config.sample_length, config.samples_per_subject) == (512, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_fields_and_what_is_given_overrides_it(method: str) -> None:
    config = FusionConfig(1, method)
    assert METHODS[method].preset.items() <= config.to_dict().items()
    given = FusionConfig(1, method, heal_tokens=0, selection="least_influence")
    assert (given.heal_tokens, given.selection) == (0, "least_influence")


@pytest.mark.parametrize(
    ("channels", "layer_parameters", "fitted", "healed"),
    [
        (1536, 3_540_096, [49152, 131072], 131072),  # SmolLM2-135M
        (2048, 5_574_912, [65536, 131072], 131072),  # Gemma 3 270M
        (14336, 218_112_000, [262144, 262144], 2097152),  # Llama-3-8B
        (8192, 60_821_504, [262144, 262144], 608215),  # Llama-3.2-1B
    ],
)
def test_tokens_follow_from_the_width(channels: int, layer_parameters: int, fitted: list[int], healed: int) -> None:
    configs = [FusionConfig(1, method).for_width(channels, layer_parameters) for method in ("refit", "healed")]
    assert [config.calibration_tokens for config in configs] == fitted
    assert [config.heal_tokens for config in configs] == [0, healed]
    given = FusionConfig(1, "healed", calibration_tokens=2048, heal_tokens=0)
    assert given.for_width(channels, layer_parameters) == given
    assert FusionConfig(1).for_width(channels, layer_parameters) == FusionConfig(1)  # which needs no text


def test_strings_are_read_as_the_fields_types_and_json_gives_the_same() -> None:
    config = FusionConfig(num_fusions=4, kernel_scale=2.5, rank_normalize=False, method="mka")
    strings: Any = {name: str(value) for name, value in config.to_dict().items() if value is not None}
    assert FusionConfig(**strings) == config
    assert FusionConfig(**json.loads(json.dumps(config.to_dict()))) == config
    numbers: Any = {"num_fusions": np.int64(4), "kernel_scale": np.float32(2.5), "rank_normalize": np.False_}
    given = FusionConfig(**numbers, method="mka").to_dict()
    assert given == config.to_dict() and json.dumps(given)  # of numpy's numbers there are none left
    tokens: Any = "2048"
    assert HealSettings(train="lora", tokens=tokens) == HealSettings(train="lora", tokens=2048)


def test_a_field_given_over_settings_brings_its_method_and_level_and_none_is_not_given() -> None:
    taken, config = FusionConfig.taken_from, FusionConfig(num_fusions=1, ridge=0.2)
    assert taken({"method": "refit"}, config) == FusionConfig(1, "refit", ridge=0.2)
    assert taken({"max_divergence": 0.1}, config) == FusionConfig(max_divergence=0.1, ridge=0.2)
    chosen = FusionConfig(num_fusions=1, selection="least_influence")
    assert taken({"method": "refit", "ridge": "0.2"}, chosen).selection == "least_influence"
    assert taken({"num_fusions": None, "ridge": None}, config) == config
    given = HealSettings(learning_rate=0.1)
    assert HealSettings.taken_from({"train": "lora", "learning_rate": None}, given).learning_rate == 0.1
