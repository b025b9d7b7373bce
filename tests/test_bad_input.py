"""Bad input gets one sentence with the value, what is allowed and what to do, before any long work.

One table says how the product is called, with what, and the words that must occur.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, pickled
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.base import Base
from lf_hf.cli import main
from lf_hf.evaluate.sweep import sweep

Edit = Callable[[Path], Any]
NAN = float("nan")


def remove(pattern: str) -> Edit:
    return lambda folder: list(map(Path.unlink, list(folder.glob(pattern))))


def only(name: str, content: str) -> Edit:
    return lambda folder: (remove("*")(folder), write(name, content)(folder))


def write(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def config(name: str = "config.json", **values: Any) -> Edit:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def report(**values: Any) -> Edit:
    return config("fusion_report.json", **values)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut(name: str, size: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def sharded(edit: Edit | None = None, **weight_map: str) -> Edit:
    """The same weights in several files; then `edit`, and entries of the index."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make_llama().save_pretrained(folder, max_shard_size="40KB")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
        (folder / INDEX).write_text(json.dumps(index))
        if edit is not None:
            edit(folder)

    return change


GPTQ = {"quant_method": "gptq", "bits": 4}
INDEX = "model.safetensors.index.json"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"


@dataclass(frozen=True)
class Places:
    base: str
    fused: str
    text: str
    out: Path


Call = Callable[..., Any]
JUDGED: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 100}
QUICK: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 0}


def python(at: Places, **kwargs: Any) -> Any:
    return FusedLlamaForCausalLM.from_pretrained_fused(**QUICK | {"base": at.base, "calibration": at.text} | kwargs)


def from_folder_to_folder(at: Places, **kwargs: Any) -> Any:
    return fuse_checkpoint(**QUICK | {"base": at.base, "out": at.out, "calibration": at.text} | kwargs)


def settings(at: Places, **kwargs: Any) -> Any:
    return FusionConfig(**{"num_fusions": 1} | kwargs)


def lm_eval(at: Places, arguments: str) -> Any:
    """`lm_eval --model fused_llama --model_args ARGUMENTS`."""
    given = arguments.format(base=at.base, fused=at.fused)
    return get_model("fused_llama").create_from_arg_string(given, {"device": "cpu", "batch_size": 1})


def healed(at: Places, *, reads_base: bool = False, **kwargs: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if not reads_base:
            patch.delattr(Base, "load")
        places: dict[str, Any] = {"fused": at.fused, "out": at.out, "base": at.base, "text": at.text}
        return lf_hf.heal(**places | kwargs)


def swept(at: Places, **kwargs: Any) -> Any:
    given: dict[str, Any] = {"num_fusions": [1], "methods": ["mka"], "tasks": ["mmlu_sample_anatomy"]}
    return sweep(at.base, at.out, **given | {"calibration": at.text} | kwargs)


def read_report(at: Places) -> Any:
    return FusionReport.load(at.fused)


def failed(at: Places, *words: Any, code: int = 1) -> Any:
    """`lf-hf WORDS`, which prints one line; raised here."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main([str(word).format(**vars(at)) for word in words]) == code
    [line] = [line for line in err.getvalue().splitlines() if line.startswith("lf-hf:")]
    assert out.getvalue() == "" and err.getvalue().endswith(f"{line}\n") and "Traceback" not in err.getvalue()
    raise ValueError(line)


def mistyped(at: Places, *words: Any) -> Any:
    """The same for a wrong command line."""
    failed(at, *words, code=2)


FUSE = ("fuse", "{base}", "{out}", "--method", "mka", "--calibration", "{text}", "--perplexity-tokens", 0)
ONE = (*FUSE, "--num-fusions", 1)
SWEEP = ("sweep", "{base}", "{out}", "--calibration", "{text}", "--methods", "mka", "--tasks", "mmlu_sample_anatomy")
HEAL = ("heal", "{fused}", "{out}", "--base", "{base}", "--text", "{text}")

Row = tuple[Call, Any, str, Edit] | tuple[Call, Any, str]

# How the product is called, with what, words of the message, and what is wrong with the checkpoint, if it is that.
ROWS: dict[str, Row] = {
    # Settings: types, ranges, choices, and what excludes what
    "none": (settings, {"num_fusions": None}, "Give one of num_fusions, target_layers, max_divergence, .* none"),
    "two levels": (settings, {"max_divergence": 0.1}, "got num_fusions=1 and max_divergence=0.1"),
    "a seed that numpy refuses": (settings, {"seed": 2**32}, "must be an integer >= 0 and <= 4294967295, got 429496"),
    "not a number": (settings, {"ridge": NAN}, "ridge must be a number > 0, got nan"),
    "a misspelt choice": (settings, {"method": "mkaa"}, "Unknown method 'mkaa'; did you mean 'mka'"),
    "groups of averages": (settings, {"selection": "groups"}, "selection='groups' is for the methods refit and healed"),
    "a setting of none": (settings, {"bet": 1}, "Unknown setting 'bet'; known are num_fusions"),
    "steps without a sequence": (healed, {"batch_tokens": 16}, "batch_tokens=16 holds no sequence of length=512"),
    # from_pretrained_fused, fuse_checkpoint and heal: each proposes its own names
    "too many": (python, {"num_fusions": 10**9}, "num_fusions must be 1 to 4 for a model of 5 layers .*, got 10000"),
    "misspelt": (from_folder_to_folder, {"num_fusionss": 2}, "Unknown argument 'num_fusionss'; did you mean 'num_fus"),
    "misspelt for heal's base": (
        healed,
        {"revison": "main", "reads_base": True},
        "cannot be loaded .*'revison'.; check the arguments",
    ),
    "a base nowhere": (python, {"base": "/no/where"}, "'/no/where', .* there is no such folder, and it cannot"),
    "a dtype that torch lacks": (python, {"dtype": "float33"}, "dtype must be auto, float32, .*, got 'float33'"),
    "a name as tokenizer": (python, {"tokenizer": "gpt2"}, "tokenizer must be a loaded tokenizer, got 'gpt2'"),
    "quantising on the way": (python, {"load_in_8bit": True}, "cannot be fused with load_in_8bit; leave it out"),
    "what nothing takes": (python, {"banana": 1}, "cannot be loaded .*unexpected keyword argument 'banana'"),
    # The base: its config and its tokenizer
    "layers of different kinds": (python, {}, "of different kinds", config(per_layer_config={"1": {"head_dim": 8}})),
    "quantised": (python, {}, "by gptq, which .* not undo; fuse", config(quantization_config=GPTQ)),
    "one layer": (python, {}, "has 1 layer; .* needs at least 2", config(num_hidden_layers=1)),
    "no heads": (python, {}, "has a config from which no Llama can be built", config(num_key_value_heads=0)),
    "nothing there": (python, {}, "No config of a model can be read for", remove("config.json")),
    "an adapter alone": (python, {}, "is an adapter", only("adapter_config.json", "{}")),
    "fused already": (python, {}, "is fused already; fuse its base with a larger", config(model_type="fused_llama")),
    "no tokenizer": (python, {}, r"No tokenizer can be read for .*; put the base's own there", remove("token*")),
    # Calibration text
    "calibrating on an array": (python, {"calibration": np.array(["a"])}, "Text must be a list of strings, a file or"),
    "half a character": (python, {"calibration": ["\ud800"] * 60}, "Sample 1 of .* cannot be used .*surrogates"),
    "little text": (python, {"calibration": ["layer"], "method": "refit"}, "has only \\d tokens, .* of 256; give more"),
    "few samples": (python, {"calibration": ["layer"] * 50}, "=50.* need at least 51 calibration samples, got 50"),
    "little text to heal on": (healed, {"text": ["short"], "written_share": 0}, "do not fill two sequences of length"),
    # Healing: its arguments, and models that do not belong together
    "a training argument of none": (healed, {"training_args": {"bf61": True}}, r"be used \(Train.* got an unexp"),
    "momentum": (healed, {"training_args": {"adam_beta1": 2}}, "cannot be used .Invalid beta parameter"),
    "rate": (
        healed,
        {"training_args": {"learning_rate": 0.1}},
        r"'learning_rate' is set by heal itself; give --learning-rate",
    ),
    "labels": (healed, {"training_args": {"label_names": ["x"]}}, "'label_names' is set by heal itself"),
    "FSDP of one process": (healed, {"training_args": {"fsdp": True}}, "only works in distributed training"),
    "no base": (healed, {"base": None}, "say where it is with base="),
    "another vocabulary": (healed, {}, "has 320 embeddings, and the fused model 330", config(vocab_size=330)),
    "another base": (healed, {"reads_base": True}, "not the base that this model was", report(base_digest="a")),
    "another report": (healed, {}, "has 4 layers, but its report says 5", report(layers_before=6, layers_after=5)),
    "nothing fused": (healed, {}, "holds no fusion_report.json", remove("fusion_report.json")),
    # Sweeps
    "no tasks": (swept, {"tasks": []}, "tasks must be a list with one entry at least"),
    "a share of questions": (swept, {"limit": 2.5}, "limit must be a number of .*, whole, or their share .*, got 2.5"),
    "examples": (swept, {"num_fewshot": 100}, "num_fewshot must be 0 to 3 for the task mmlu_sample_anatomy, got 100"),
    # lm-eval's model args, all strings
    "lm-eval, not fused": (lm_eval, ["pretrained={base}"], "that is not fused; give num_fusions=N"),
    "lm-eval, nothing": (lm_eval, [""], "pretrained is missing; give pretrained=NAME, a base to fuse"),
    "lm-eval, misspelt": (lm_eval, ["pretrained={base},num_fusion=1"], "'num_fusion'; did you mean 'num_fusions'?"),
    "lm-eval, an adapter": (lm_eval, ["pretrained={base},num_fusions=1,peft=no/where"], "'no/where'"),
    "lm-eval, settings": (lm_eval, ["pretrained={fused},method=mka,seed=1"], "method, seed without num_fusions has no"),
    # Saved fusions, edited by hand
    "a report cut off": (read_report, {}, "fusion_report.json' is not JSON", cut("fusion_report.json", 300)),
    # Commands: a wrong command line, and failures
    "layers for this model": (failed, (*FUSE, "--target-layers", 5), "must be 1 to 4 for a base of 5 layers, got 5"),
    "arguments as options": (mistyped, (*ONE, "--selection", "groups"), "--selection 'groups' .* --method 'mka'"),
    "no level": (mistyped, FUSE, "Give one of --num-fusions, --target-layers, "),
    "a misspelt option": (mistyped, (*FUSE, "--num-fusion", 1), "--num-fusions"),
    "levels of a sweep": (mistyped, (*SWEEP, "--num-fusions", "1,,2"), "--num-fusions must be an integer >= 1, got ''"),
    "metadata": (mistyped, (*SWEEP, "--num-fusions", "1", "--metadata", "mmlu"), "value for '--metadata': Expecting"),
    "a training argument": (mistyped, (*HEAL, "--arg", "bf16"), "must be NAME=VALUE, got 'bf16'"),
    "no such folder": (failed, ("fuse", "{base}", "{out}/../x", "--num-fusions", 1), "x' leads through a folder that"),
    "a disk as device": (failed, (*ONE, "--device", "disk"), "'disk' cannot be used"),
    "memory of a place that is none": (failed, (*ONE, "--max-memory", "20GiB"), "--max-memory must be places and siz"),
    "a card that is not here": (failed, (*ONE, "--max-memory", "cuda:7=20GiB,cpu=4GiB"), "does not have; a dry run"),
    "cut off, in a dry run": (failed, (*ONE, "--dry-run"), "cannot be read .* download", cut("model.safetensors", 99)),
}

# Types of models, and why none of them fuses or what does instead.
OTHERS = {
    **dict.fromkeys(("qwen3_vl_text", "qwen2_vl", "bert", "gpt2"), "only models of these types fuse: llama, mistral, "),
    **dict.fromkeys(("deepseek_v3", "llama4", "ernie4_5_moe"), "of mixtures of experts only those of these types"),
    **dict.fromkeys(("granitemoehybrid", "nemotron_h"), "its layers are Mamba's"),
    **dict.fromkeys(("gemma3n", "gemma4", "gemma4_text"), "its layers share keys and values"),
    "lfm2": "its layers are convolutions",
    "llava": "save its decoder, a 'llama', by itself and fuse that; gemma3, .*, qwen3_vl fuse as a whole",
}
for kind, words in OTHERS.items():
    dense = ', "num_local_experts": 0' if kind == "granitemoehybrid" else ""  # as in its dense models
    edit = only("config.json", f'{{"model_type": "{kind}"{dense}}}')
    ROWS[f"a model of type {kind}"] = (python, {}, f"is a '{kind}' model; {words}", edit)

# What is wrong with the weights; the folder-to-folder path and the one in memory say the same.
WEIGHTS: dict[str, tuple[Edit, str]] = {
    "NaN": (tensors(lambda held: held[UP].view(-1)[5:6].fill_(NAN)), f"{UP} contains NaN or inf; repair the base"),
    "activations that overflow": (tensors(lambda held: held[DOWN].mul_(1e38)), "activations of layer 2"),
    "cut off": (cut("model.safetensors", 9000), r"safetensors' cannot be read \(.*; if it is not whole, download"),
    "gone": (remove("model.safetensors"), "holds neither model.safetensors nor .* use_safetensors=False"),
    "a shard gone": (sharded(remove("model-00002*")), "model-00002.*' cannot be read .*No such file"),
    "an index that is wrong": (sharded(lm_head__weight="model-00002-of-00007.safetensors"), "no tensor 'lm_head.weig"),
    "shapes": (config(intermediate_size=64), r"down_proj.weight' in shape \[32, 48\], but by .* \[32, 64\]"),
    "more layers in the config": (config(num_hidden_layers=6), "has no tensor 'model.layers.5.*', which its config"),
    "integers": (
        tensors(lambda held: held.update({UP: held[UP].char()})),
        "of type I8, not plain floats; convert",
    ),
    "no metadata": (sharded(config(INDEX, metadata=None)), f"{INDEX} has no metadata, as an index must have; "),
    "pickled": (pickled, "convert pickled weights, which can run code when they are read, to safetensors"),
    "elsewhere by ..": (sharded(lm_head__weight="../x.safetensors"), "names '../x.safetensors' as a file of weights"),
}
ROWS |= {
    f"{name}, {call.__name__}": (call, {"method": "mka"}, message, edit)
    for name, (edit, message) in WEIGHTS.items()
    for call in (python, from_folder_to_folder)
}


@pytest.fixture
def at(base: str, fused: Path, text: Path, tmp_path: Path) -> Places:
    """Copies of whole checkpoints, and text that is enough."""
    for name, source in (("base", base), ("fused", fused)):
        shutil.copytree(source, tmp_path / name)
    return Places(str(tmp_path / "base"), str(tmp_path / "fused"), str(text), tmp_path / "out")


@pytest.mark.usefixtures("own_tasks")
@pytest.mark.parametrize("name", ROWS)
def test_one_sentence_before_any_work(at: Places, name: str, request: pytest.FixtureRequest) -> None:
    if name == "layers of different kinds" and not hasattr(LlamaConfig(), "per_layer_config"):
        pytest.skip("this transformers has layers of one kind in a config")
    call, arguments, pattern, *edits = ROWS[name]
    for edit in edits:
        edit(Path(at.fused if call in (read_report, healed) else at.base))
    if not name.startswith("activations"):
        request.getfixturevalue("no_work")
    words, named = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    with pytest.raises((ValueError, OSError)) as error:
        call(at, *words, **named)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    assert re.search(pattern, message), message
    assert not [*at.out.glob("*")] and "ACCELERATE_USE_FSDP" not in os.environ
    assert {path.name for path in at.out.parent.iterdir()} <= {"base", "fused", "out"}
