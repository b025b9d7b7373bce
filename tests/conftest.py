"""Tiny real Llama models with a real tokenizer, made on the fly."""

import functools
import gc
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network
os.environ["HF_ASSETS_CACHE"] = os.devnull  # nor find what was read from one

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lf_hf import FusedLlamaForCausalLM, FusionConfig
from lf_hf.decoder.decoder import Decoder
from lf_hf.measure import judge, speed
from lf_hf.pipeline.dry_run import DryRun, plan_fusion
from lf_hf.pipeline.fusion import FusionInputs


def open_file(fd: Any) -> None:
    """In place of `os.fsync`, as no test cuts the power, and disks are slow: raises OSError if no file is open."""
    os.fstat(fd)


os.fsync = open_file
judge.CONTINUED_LENGTH = 6  # tokens that models add to each prompt; 24 take longer and show no more of tiny ones

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
SMOLLM2 = ROOT / ".cache" / "smollm2" / "checkpoint"

WORDS = "layer model neuron weight fuse match row column head state token train learn small large deep".split()


def make_texts(count: int = 57, seed: int = 0) -> list[str]:
    """Short random sentences of different lengths."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) + f" {n}." for n in range(count)]


def dry_run(base: str | Path, config: FusionConfig, *, calibration: Any = None, **given: Any) -> DryRun:
    """What is said of what `fuse_checkpoint` would do with these arguments."""
    out, overwrite = given.pop("out", None), given.pop("overwrite", False)
    return plan_fusion(FusionInputs.open(base, config, calibration, None, given), out, overwrite=overwrite)


ON_DISK: dict[str, Any] = {"device_map": {"": "disk"}}
"""All weights: what a plan does by itself where little memory may be used, but of models that are not tiny."""


def files(folder: Path) -> dict[str, bytes]:
    """What is in the files of a folder, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pickled(folder: Path) -> None:
    """Keep a checkpoint's weights in a pickle alone."""
    torch.save(tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def same(one: Any, other: Any) -> bool:
    """Whether two models, or the weights of two, have the same names, types and bits."""
    left, right = (given if isinstance(given, dict) else given.state_dict() for given in (one, other))
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name]) and tensor.dtype == right[name].dtype for name, tensor in left.items()
    )


def changed(one: Path, other: Path) -> set[str]:
    """The tensors in which two checkpoints of one layout differ."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def run_program(program: str, *words: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a program that lies beside the tests on the CPU, in several processes as torchrun starts them."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split() if processes > 1 else []
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "USE_HUB_KERNELS": "0"}
    return subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests" / program), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=1800,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(200, seed=1), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Settings of tiny models: grouped-query attention, and weights large enough to matter."""

QUICK: dict[str, Any] = {"num_fusions": 1, "method": "truncate", "perplexity_tokens": 0}
"""Settings of the quickest fusion."""


def make_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama of 5 layers with grouped-query attention, weights large enough to matter."""
    dtype = overrides.pop("dtype", torch.float32)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY | overrides)).eval()
    vary(model)
    return model.to(dtype)


@torch.no_grad()
def vary(model: torch.nn.Module, gain_offset: float = 0.0) -> None:
    """Give biases and gains, which begin as zeros and ones, values that show where one is not moved."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)
            parameter.sub_(gain_offset)


def save_base(folder: Path, model: Any = None, tokenizer: Any = None) -> str:
    """Make a folder a checkpoint that can be fused."""
    (model or make_llama()).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def pytest_collection_finish() -> None:
    """What was imported stays, so that a collection of garbage need not look through it, which takes .4 s."""
    gc.collect()
    gc.freeze()


_measure_speed = speed.measure_speed


@pytest.fixture(scope="session", autouse=True)
def _no_speed() -> Iterator[None]:
    """Nothing is timed but where a test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure_speed", lambda *_: None)
        yield


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fusions and healings are timed, in as few runs as there may be."""
    monkeypatch.setattr(speed, "measure_speed", _measure_speed)
    monkeypatch.setattr(speed, "SECONDS", 0.0)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer may be run."""
    monkeypatch.setattr(Decoder, "run_layer", lambda *_: pytest.fail("ran a layer"))
    monkeypatch.setattr("lf_hf.measure.check.check_family_entry", lambda _: None)  # runs layers of its own


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text, enough to fit short sequences to."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(make_texts(150)), encoding="utf-8")
    return file


@pytest.fixture
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Make a checkpoint folder: make_base(**config overrides) -> path."""
    return lambda **overrides: save_base(tmp_path_factory.mktemp("base"), make_llama(**overrides))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint that tests only read."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def family_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny checkpoint of some family, family_base(model_type, **config overrides), that tests only read."""
    from tiny_models import tiny_model  # which imports this

    made: dict[str, Path] = {}

    def make(model_type: str, **overrides: Any) -> Path:
        key = f"{model_type} {overrides}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base")
            save_base(made[key], tiny_model(model_type, **overrides))
        return made[key]

    return make


@pytest.fixture(scope="session")
def fused(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint `base` with its last two layers fused, which tests only read."""
    folder = tmp_path_factory.mktemp("fused") / "model"
    FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def own_tasks() -> Iterator[None]:
    """lm-eval knows tasks of ours alone; to look through all takes it seconds."""
    from lm_eval.tasks import TaskManager  # takes seconds

    only_own = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", only_own)
        yield


@pytest.fixture
def run_lm_eval(monkeypatch: pytest.MonkeyPatch, own_tasks: None) -> Callable[[Sequence[str]], None]:
    """Run the command lm_eval in this process."""
    from lm_eval.__main__ import cli_evaluate

    logger = logging.getLogger("lm_eval")  # which it sets up
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(logger, "handlers", [*logger.handlers])

    def run(words: Sequence[str]) -> None:
        monkeypatch.setattr("sys.argv", ["lm_eval", *words])
        cli_evaluate()

    return run


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real Llama."""
    if not SMOLLM2.is_dir():
        pytest.skip(f"{SMOLLM2.relative_to(ROOT)} is missing; scripts/quickstart and scripts/test make it")
    return SMOLLM2


@pytest.fixture(scope="session")
def mmlu_dir() -> Path:
    folder = SHARED_DATA / "mmlu"
    if not folder.is_dir():
        pytest.skip("the MMLU CSV release is not beside this checkout")
    return folder
