"""Bad input gets one sentence with the value, what is allowed and what to do, before any long work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_texts
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint, tasks_path
from lf_hf.cli import main
from lf_hf.decoder.interface import Decoder
from lf_hf.evaluate.sweep import sweep

Edit = Callable[[Path], Any]
NAN, INF = float("nan"), float("inf")
LARGE = 10**400  # no float comes near


# Ways to damage a copy of a whole checkpoint.


def remove(pattern: str) -> Edit:
    return lambda folder: list(map(Path.unlink, list(folder.glob(pattern))))


def write(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(name: str, **values: Any) -> Edit:
    return lambda folder: (folder / name).write_text(
        json.dumps(json.loads((folder / name).read_text(encoding="utf-8")) | values), encoding="utf-8"
    )


def config(**values: Any) -> Edit:
    return edit_json("config.json", **values)


def report(**values: Any) -> Edit:
    return edit_json("fusion_report.json", **values)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def weight(name: str, value: float) -> Edit:
    return tensors(lambda held: held[name].view(-1)[5:6].fill_(value))


def cut(name: str, size: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def sharded(edit: Edit | None = None, **weight_map: str) -> Edit:
    """The same weights in several files; then `edit`, and entries of the index."""

    def change(folder: Path) -> None:
        make_llama().save_pretrained(folder / "shards", max_shard_size="40KB")
        (folder / "model.safetensors").unlink()
        for file in (folder / "shards").glob("model*"):
            file.rename(folder / file.name)
        shutil.rmtree(folder / "shards")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
        (folder / INDEX).write_text(json.dumps(index))
        if edit is not None:
            edit(folder)

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def questions(content: bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "dev").mkdir()
        (folder / "dev" / "anatomy_dev.csv").write_bytes(content)

    return edit


INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


# Ways to call the library: each gets the checkpoint, a folder for output and the row's arguments.


@dataclass(frozen=True)
class Places:
    base: str
    fused: str
    text: str
    out: Path


Call = Callable[..., Any]
QUICK: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 0}


def python(at: Places, **kwargs: Any) -> Any:
    given: dict[str, Any] = {"base": at.base, "calibration": at.text} | QUICK | kwargs
    return FusedLlamaForCausalLM.from_pretrained_fused(**given)


def from_folder_to_folder(at: Places, **kwargs: Any) -> Any:
    given: dict[str, Any] = {"base": at.base, "out": at.out, "calibration": at.text} | QUICK | kwargs
    return fuse_checkpoint(**given)


def settings(at: Places, **kwargs: Any) -> Any:
    return FusionConfig(**{"num_fusions": 1} | kwargs)


def calibrate(at: Places, content: bytes = b"", name: str = "text.txt", **kwargs: Any) -> Any:
    file = Path(at.base) / name
    file.write_bytes(content)
    return python(at, calibration=str(file), **kwargs)


def swept(at: Places, **kwargs: Any) -> Any:
    given: dict[str, Any] = {"num_fusions": [1], "methods": ["mka"], "tasks": ["mmlu_sample_anatomy"]}
    given |= {"base": at.base, "out": at.out, "calibration": at.text, "settings": {"perplexity_tokens": 0}} | kwargs
    return sweep(**given)


def lm_eval(at: Places, arguments: str) -> Any:
    """`lm_eval --model fused_llama --model_args ARGUMENTS`."""
    given = arguments.format(base=at.base, fused=at.fused, text=at.text)
    return get_model("fused_llama").create_from_arg_string(given, {"device": "cpu", "batch_size": 1})


def task(at: Places, **metadata: Any) -> Any:
    values = {name: value.format(base=at.base) if isinstance(value, str) else value for name, value in metadata.items()}
    return TaskManager(include_path=str(tasks_path()), include_defaults=False, metadata=values).load(
        "mmlu_5shot_anatomy"
    )


def loaded(at: Places) -> Any:
    return FusedLlamaForCausalLM.from_pretrained(at.fused)


def read_report(at: Places) -> Any:
    return FusionReport.load(at.fused)


def command(at: Places, *words: Any) -> Any:
    """`lf-hf WORDS`; for once its exit code instead of an error."""
    places = {"base": at.base, "fused": at.fused, "text": at.text, "out": at.out}
    return main([str(word).format(**places) for word in words])


FUSE = ("fuse", "{base}", "{out}", "--calibration", "{text}", "--perplexity-tokens", 0)
ONE = (*FUSE, "--num-fusions", 1)
SWEEP = ("sweep", "{base}", "{out}", "--calibration", "{text}", "--methods", "mka", "--tasks", "mmlu_sample_anatomy")

Row = tuple[Call, Any, str, Edit] | tuple[Call, Any, str]

# How to call, with what, the message, and what is wrong with the checkpoint, if it is that.
PYTHON: dict[str, Row] = {
    # Settings: types and ranges
    "nothing said": (lambda at: FusedLlamaForCausalLM.from_pretrained_fused(at.base), {}, "Give one of num_fusions"),
    "none": (
        settings,
        {"num_fusions": None},
        "Give one of num_fusions, max_divergence, max_perplexity_ratio, .*; got none of them",
    ),
    "a string": (settings, {"num_fusions": "4"}, "num_fusions must be an integer of at least 1, got '4'"),
    "a float": (settings, {"num_fusions": 4.0}, "num_fusions must be an integer of at least 1, got 4.0"),
    "negative": (settings, {"num_fusions": -1}, "num_fusions must be an integer of at least 1, got -1"),
    "too large for all": (settings, {"num_fusions": LARGE}, "num_fusions must be at most 4294967295, got 1000"),
    "a seed that numpy refuses": (settings, {"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
    "not a number": (settings, {"ridge": NAN}, "ridge must be a finite number greater than 0, got nan"),
    "infinite": (settings, {"ratio_beta": -INF}, "ratio_beta must be a finite number, got -inf"),
    "no float": (settings, {"kernel_scale": LARGE}, "kernel_scale must be a finite number greater than 0, got 1000"),
    "a list as choice": (settings, {"method": ["mka"]}, r"method must be one of neural_alignment, .*, got \['mka'\]"),
    "a long value": (settings, {"method": "m" * 5000}, "^Unknown method 'm{79}; known are neural_align"),
    # from_pretrained_fused and fuse_checkpoint: arguments
    "for this model too many": (python, {"num_fusions": 10**9}, "num_fusions must be 1 to 4 .*, got 1000000000"),
    "too many for the pairs": (
        python,
        {"num_fusions": 3, "method": "refit"},
        "must be 1 to 2 for a model of 5 layers and selection='least_influence', got 3",
    ),
    "misspelt": (from_folder_to_folder, {"num_fusionss": 2}, "Unknown argument 'num_fusionss'; did you mean 'num_fus"),
    "no config": (
        python,
        {"config": {"num_fusions": 1}},
        r"must be a FusionConfig, got \{'num_f.*; give its",
    ),
    "no name": (python, {"base": ""}, "base must be the folder or hub name of a checkpoint, got ''"),
    "a number as base": (from_folder_to_folder, {"base": 3}, "base must be the folder or hub name .*, got 3"),
    "a base nowhere": (python, {"base": "/no/where"}, "There is no folder '/no/where'"),
    "a dtype that torch lacks": (python, {"dtype": "float33"}, "dtype must be auto, float32, .*, got 'float33'"),
    "a dtype of integers": (from_folder_to_folder, {"dtype": torch.int8}, "dtype must be auto, .*, got torch.int8"),
    "a device that torch lacks": (python, {"device_map": "banana"}, r"The device 'banana' cannot be used \(.*; take"),
    "a name as tokenizer": (python, {"tokenizer": "gpt2"}, "tokenizer must be a loaded tokenizer, got 'gpt2'"),
    "no shard size": (from_folder_to_folder, {"max_shard_bytes": 0}, "max_shard_bytes must be .* at least 1, got 0"),
    "quantising on the way": (python, {"load_in_8bit": True}, "load_in_8bit cannot be used while fusing; fuse in"),
    # The base: its config
    "gpt2": (
        python,
        {},
        "is a 'gpt2' model; only dense decoders of text",
        write("config.json", '{"model_type": "gpt2"}'),
    ),
    "mixtral": (from_folder_to_folder, {}, "is a 'mixtral' model; only dense decoders", config(model_type="mixtral")),
    "olmoe": (python, {}, "is a 'olmoe' model; only dense decoders", config(model_type="olmoe")),
    "unheard of": (python, {}, "No config of a model can be read for .*llamma", config(model_type="llamma")),
    "code of its own": (
        python,
        {},
        "No config of a model can be read for .*contains custom code",
        config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
    ),
    "layers of different kinds": (python, {}, "of different kinds", config(per_layer_config={"1": {"head_dim": 8}})),
    "quantised": (python, {}, "is quantised; fuse the original", config(quantization_config={"quant_method": "gptq"})),
    "one layer": (python, {}, "has 1 layers; fusing .* needs at least 2", config(num_hidden_layers=1)),
    "layers in words": (python, {}, "No config of a model .*num_hidden_layers", config(num_hidden_layers="five")),
    "heads that do not divide": (python, {}, "No config of a model .*heads", config(num_attention_heads=5)),
    "no context": (python, {}, "has max_position_embeddings=1, .* 16 tokens", config(max_position_embeddings=1)),
    "a config that is no JSON": (python, {}, "No config of a model can be read for", write("config.json", b"\xff\0")),
    "a config that is a list": (python, {}, "No config of a model can be read for", write("config.json", "[]")),
    "weights named elsewhere": (
        python,
        {},
        "names its file of weights, '../x.safetensors' .*; rename that to model.safetensors",
        config(transformers_weights="../x.safetensors"),
    ),
    "an adapter": (
        python,
        {},
        "is an adapter, not a model; merge it into its base",
        write("adapter_config.json", '{"base_model_name_or_path": "/etc"}'),
    ),
    # The base: its tokenizer
    "no tokenizer": (python, {}, r"No tokenizer can be read for .*; put the base's own there", remove("token*")),
    "a broken tokenizer": (from_folder_to_folder, {}, "No tokenizer can be read for", write("tokenizer.json", "{")),
    "another tokenizer": (
        from_folder_to_folder,
        {"perplexity_tokens": 100, "method": "truncate"},
        r"gives token id \d+, but the model has 64 embeddings; use the tokenizer that belongs",
        lambda folder: make_llama(vocab_size=64).save_pretrained(folder),
    ),
    # Calibration files
    "calibrating on a number": (python, {"calibration": 3}, "Text must be a list of strings, a file or .*, got 3"),
    "half a character": (python, {"calibration": ["\ud800"] * 60}, "Sample 1 of .* cannot be used .*surrogates"),
    "an empty file": (calibrate, {}, r"The text \(text.txt\) is empty; give a file with text"),
    "a binary file": (calibrate, {"content": bytes(range(256))}, "'text.txt' cannot be read .*0x80"),
    "a few samples": (calibrate, {"content": b"a\n\nb"}, "need at least 51 calibration samples, got 2; give more"),
    "little text": (
        calibrate,
        {"content": b"layer", "method": "refit"},
        r"\(text.txt, MMLU development questions\) has only \d tokens, .* sequence of 256; give more text",
        write("model.safetensors", b""),  # which are not read before that is said
    ),
    "an unknown kind": (python, {"calibration": "a.docx"}, "'a.docx' cannot be read .* give a .txt, .jsonl, .csv"),
    "other columns": (calibrate, {"content": b"a,b\n1,2\n", "name": "a.csv"}, "'a.csv' cannot be read .*'text'"),
    # Sweeps
    "one level": (swept, {"num_fusions": 4}, "num_fusions must be a list, got 4"),
    "one method": (swept, {"methods": "mka"}, "methods must be a list, got 'mka'"),
    "a level in words": (
        swept,
        {"num_fusions": [1, "four"]},
        "num_fusions must be an integer of at least 1, got 'four'",
    ),
    "a level of half a layer": (swept, {"num_fusions": [0.5]}, "num_fusions must be an integer of .*, got 0.5"),
    "an unknown setting": (swept, {"settings": {"bet": 1}}, "Unknown fusion setting 'bet'"),
    "settings that are none": (swept, {"settings": [1]}, r"settings must be a dict of FusionConfig .*, got \[1\]"),
    "no questions": (swept, {"limit": 0}, "limit must be a number of questions, .*, got 0"),
    "negative shots": (swept, {"num_fewshot": -1}, "num_fewshot must be an integer of at least 0, got -1"),
    "no batch": (swept, {"batch_size": "0"}, "batch_size must be an integer of at least 1, auto, or auto:N, got '0'"),
    "an unknown task": (swept, {"tasks": ["mmlu_sampel"]}, "Unknown task 'mmlu_sampel'; did you mean 'mmlu_sample'"),
    "calibrating a sweep on text": (swept, {"calibration": ["a"]}, r"calibration must be the path .*, got \['a'\]"),
    # lm-eval's model args, all strings
    "lm-eval, in words": (
        lm_eval,
        "pretrained={base},num_fusions=four",
        "must be an integer of at least 1, got 'four'",
    ),
    "lm-eval, a float": (lm_eval, "pretrained={base},num_fusions=4.0", "must be an integer of .*, got 4.0"),
    "lm-eval, negative": (lm_eval, "pretrained={base},num_fusions=-1", "integer of at least 1, got -1"),
    "lm-eval, huge": (lm_eval, "pretrained={base},num_fusions=1000000000", "must be 1 to 4 .*, got 1000000000"),
    "lm-eval, infinite": (lm_eval, "pretrained={base},num_fusions=1,ridge=1e999", "ridge must be a finite number"),
    "lm-eval, yes": (lm_eval, "pretrained={base},num_fusions=1,rank_normalize=yes", "must be true or false, got 'yes'"),
    "lm-eval, dtype": (lm_eval, "pretrained={base},num_fusions=1,dtype=float33", "dtype must be auto, .*'float33'"),
    "lm-eval, no base": (lm_eval, "pretrained=,num_fusions=1", "base must be the folder or hub name"),
    "lm-eval, calibration": (lm_eval, "pretrained={base},num_fusions=1,calibration=no.txt", "'no.txt' cannot be read"),
    "lm-eval, not fused": (lm_eval, "pretrained={base}", "that is not fused; give num_fusions=N"),
    "lm-eval, no tokenizer": (lm_eval, "pretrained={base},num_fusions=1", "No tokenizer can", remove("token*")),
    "lm-eval, mixtral": (lm_eval, "pretrained={base},num_fusions=1", "'mixtral' model", config(model_type="mixtral")),
    # Task metadata
    "tasks nowhere": (task, {"mmlu_dir": "no"}, "'no' is not the folder .* of dev/anatomy_dev.csv cannot be read"),
    "tasks in a number": (task, {"mmlu_dir": 3}, "mmlu_dir='3' is not the folder of the original MMLU release"),
    "tasks in Latin-1": (
        task,
        {"mmlu_dir": "{base}"},
        "row 1 of dev/anatomy_dev.csv cannot be read .*0xe9",
        questions(b"\xe9,1,2,3,4,A"),
    ),
    # Saved fusions, edited by hand
    "a fusion that is a number": (
        loaded,
        {},
        "fusion in the config of .* must be an object or null, got 3; save",
        config(fusion=3),
    ),
    "layers beyond the weights": (loaded, {}, "num_hidden_layers", config(num_hidden_layers="many")),
    "a report in words": (read_report, {}, "no fusion report: it.layers_before must be", report(layers_before="5")),
    "a report of no layers": (read_report, {}, "fusion report: layers_before=0 is not 2 to", report(layers_before=0)),
    "a report of huge models": (read_report, {}, "layers_before=1000000000000 is not", report(layers_before=10**12)),
    "a report without steps": (read_report, {}, "layers_after=4 is not what the steps leave", report(steps=[])),
    "a report cut off": (read_report, {}, "fusion_report.json' is not JSON", cut("fusion_report.json", 300)),
    "fused already": (python, {}, "is fused already; fuse its base with a larger", config(model_type="fused_llama")),
}

# What is wrong with the weights; the folder-to-folder path and the one in memory say the same.
WEIGHTS: dict[str, tuple[Edit, str]] = {
    "NaN": (weight(UP, NAN), f"{UP} contains NaN or inf; repair the base"),
    "infinite": (weight(UP, -INF), f"{UP} contains NaN or inf; repair the base"),
    "activations that overflow": (
        tensors(lambda held: held["model.layers.2.mlp.down_proj.weight"].mul_(1e38)),
        "activations of layer 2",
    ),
    "cut off": (cut("model.safetensors", 9000), r"'model.safetensors' is not a whole safetensors file \(.*; download"),
    "of another kind": (write("model.safetensors", b"x" * 999), "'model.safetensors' is not a whole safetensors file"),
    "empty": (write("model.safetensors", b""), "'model.safetensors' is not a whole safetensors file"),
    "gone": (remove("model.safetensors"), "holds neither model.safetensors nor .* use_safetensors=False"),
    "a shard gone": (sharded(remove("model-00002*")), "The shard 'model-00002.*' that .* names is missing"),
    "an index that is no JSON": (sharded(write(INDEX, "{")), "json is not JSON"),
    "an index of nothing": (sharded(write(INDEX, "{}")), f"{INDEX} is not an index of safetensors files"),
    "an index that is wrong": (
        sharded(lm_head__weight="model-00002-of-00007.safetensors"),
        "says that 'lm_head.weight' is in 'model-00002-of-00007.safetensors', but it is not",
    ),
    "a tensor gone": (tensors(lambda held: held.pop(UP)), f"has no tensor '{UP}', which its config"),
    "shapes": (config(intermediate_size=64), r"down_proj.weight' in .* has shape \[32, 48\], but by .* \[32, 64\]"),
    "fewer layers in the config": (config(num_hidden_layers=4), "holds 'model.layers.4.*', which its config.json does"),
    "more layers in the config": (config(num_hidden_layers=6), "has no tensor 'model.layers.5.*', which its config"),
    "a bias that is not in the config": (
        tensors(lambda held: held.update({UP.replace("weight", "bias"): torch.ones(48)})),
        "holds 'model.layers.1.mlp.up_proj.bias', which its config.json does not know",
    ),
    "pickled": (pickled, "pickled weights can run code when they are read; convert them"),
    "elsewhere by ..": (sharded(lm_head__weight="../x.safetensors"), "names '../x.safetensors' as a file of weights"),
    "elsewhere by /": (sharded(lm_head__weight="/etc/x.safetensors"), "names '/etc/x.safetensors' as a file of"),
    "a pickled shard": (sharded(lm_head__weight="model.bin"), "names 'model.bin' as a file of weights; only safetens"),
}

# What follows `lf-hf`, the exit code, the message, and what is wrong with the checkpoint.
COMMANDS: dict[str, tuple[tuple[Any, ...], int, str] | tuple[tuple[Any, ...], int, str, Edit]] = {
    "in words": ((*FUSE, "--num-fusions", "four"), 2, "num_fusions must be an integer of at least 1, got 'four'"),
    "a float": ((*FUSE, "--num-fusions", "4.0"), 2, "num_fusions must be an integer of at least 1, got '4.0'"),
    "negative": ((*FUSE, "--num-fusions", -1), 2, "num_fusions must be an integer of at least 1, got -1"),
    "huge": ((*FUSE, "--num-fusions", 10**9), 1, "num_fusions must be 1 to 4 .*, got 1000000000"),
    "not a number": ((*ONE, "--ridge", "nan"), 2, "ridge must be a finite number greater than 0, got nan"),
    "dtype": ((*ONE, "--dtype", "int8"), 2, "'int8' is not one of 'float32'"),
    "device": ((*ONE, "--device", "banana"), 1, "The device 'banana' cannot be used"),
    "nothing": (("melt", "{base}"), 2, "melt"),
    "no folder": (("fuse", "{base}"), 2, "OUT"),
    "base nowhere": (("fuse", "/no/where", "{out}", "--num-fusions", 1), 1, "There is no folder '/no/where'"),
    "cut-off weights": (ONE, 1, "is not a whole safetensors file", cut("model.safetensors", 9000)),
    "a plan with cut-off weights": ((*ONE, "--dry-run"), 1, "is not a whole", cut("model.safetensors", 9000)),
    "a plan with no tokenizer": ((*ONE, "--dry-run"), 1, "No tokenizer can be read", remove("token*")),
    "a plan with little text": (
        (*FUSE[:4], "{base}/a.txt", "--num-fusions", 1, "--method", "refit", "--dry-run"),
        1,
        "do not fill one sequence",
        write("a.txt", "layer"),
    ),
    "NaN weights": ((*ONE, "--low-memory"), 1, "contains NaN or inf", weight(UP, NAN)),
    "pickled weights": (ONE, 1, "pickled weights can run code", pickled),
    "mixtral": (ONE, 1, "'mixtral' model", config(model_type="mixtral")),
    "no tokenizer": (ONE, 1, "No tokenizer can be read", remove("token*")),
    "levels": ((*SWEEP, "--num-fusions", "1,,2"), 2, "--num-fusions must be integers .*, got '1,,2'"),
    "levels that are too many": ((*SWEEP, "--num-fusions", "9"), 1, "num_fusions must be 1 to 4 .*, got 9"),
    "limit": ((*SWEEP, "--num-fusions", "1", "--limit", -1), 2, "limit must be a number of questions, .*, got -1"),
    "metadata": ((*SWEEP, "--num-fusions", "1", "--metadata", "[[1,2]]"), 2, r"metadata must be a dict, .*\[\[1, 2"),
    "metadata, no JSON": ((*SWEEP, "--num-fusions", "1", "--metadata", "mmlu"), 2, "--metadata is not JSON"),
    "batch": ((*SWEEP, "--num-fusions", "1", "--batch-size", "many"), 2, "batch_size must be .*, got 'many'"),
    "NaN weights of a sweep": ((*SWEEP, "--num-fusions", "1"), 1, "contains NaN or inf", weight(UP, NAN)),
    "no report": (("report", "{base}"), 1, "holds no fusion_report.json"),
    "a report edited": (("report", "{fused}"), 1, "step 1 fuses layers that are not there", report(layers_before=4)),
    "a page nowhere": (("report", "{fused}", "--html", "/no/where.html"), 1, "No such file"),
}


@pytest.fixture(scope="module", autouse=True)
def _one_task_index() -> Iterator[None]:
    """lm-eval takes seconds to look through all its tasks; here only ours are wanted."""
    index = TaskManager(include_path=str(tasks_path()), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: index)
        yield


@pytest.fixture(scope="module")
def fused(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that was saved fused; tests only read it."""
    folder = str(tmp_path_factory.mktemp("fused") / "model")
    settings: dict[str, Any] = {"num_fusions": 1, "method": "truncate", "perplexity_tokens": 0}
    FusedLlamaForCausalLM.from_pretrained_fused(base, **settings).save_pretrained(folder)
    return folder


@pytest.fixture
def at(base: str, fused: str, tmp_path: Path) -> Places:
    """Copies of whole checkpoints, and text that is enough."""
    for name, source in (("base", base), ("fused", fused)):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(400)), encoding="utf-8")
    base, fused, text = (str(tmp_path / name) for name in ("base", "fused", "text.txt"))
    return Places(base, fused, text, tmp_path / "out")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer may be run."""
    monkeypatch.setattr(Decoder, "run_layer", lambda *_: pytest.fail("ran a layer"))
    monkeypatch.setattr("lf_hf.pipeline.check_computes", lambda _: None)  # runs layers of its own


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check(message: str, pattern: str, at: Places) -> None:
    assert "\n" not in message and len(message) < 700
    assert re.search(pattern, message), message
    assert not at.out.exists() or not any(at.out.iterdir())
    assert {path.name for path in at.out.parent.iterdir() if not path.name.startswith("elsewhere-")} <= {
        *("base", "fused", "text.txt", "out")
    }


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", PYTHON)
def test_in_python_one_sentence_before_any_work(at: Places, name: str) -> None:
    if name == "layers of different kinds" and not hasattr(LlamaConfig(), "per_layer_config"):
        pytest.skip("this transformers has layers of one kind in a config")
    call, arguments, message, *edits = PYTHON[name]
    for edit in edits:
        edit(Path(at.fused if call in (loaded, read_report, command) else at.base))
    with pytest.raises((ValueError, OSError)) as error:
        call(at, arguments) if isinstance(arguments, str) else call(at, **arguments)
    check(str(error.value), message, at)


@pytest.mark.parametrize("call", [python, from_folder_to_folder])
@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights_get_the_same_sentence_however_they_are_read(
    at: Places, call: Call, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, message = WEIGHTS[name]
    edit(Path(at.base))
    if "activations" not in name:
        monkeypatch.setattr(Decoder, "run_layer", lambda *_: pytest.fail("ran a layer"))
        monkeypatch.setattr("lf_hf.pipeline.check_computes", lambda _: None)  # runs layers of its own
    with pytest.raises(ValueError, match=message) as error:
        call(at, method="mka")
    check(str(error.value), message, at)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_one_line_and_say_whose_fault_it_is(
    at: Places, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, message, *edits = COMMANDS[name]
    for edit in edits:
        edit(Path(at.fused if words[0] == "report" else at.base))
    before = snapshot(Path(at.fused))
    assert command(at, *words) == code
    out, err = capfd.readouterr()
    *others, last = err.splitlines()
    assert out == "" and "Traceback" not in err and not any(line.startswith("lf-hf:") for line in others)
    check(last, f"^lf-hf: .*{message}", at)
    assert snapshot(Path(at.fused)) == before
