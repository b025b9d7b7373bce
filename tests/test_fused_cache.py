from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_llama, make_texts, make_tokenizer
from huggingface_hub import cached_assets_path
from test_saving import no_privileges
from tokenizers import normalizers

import lf_hf
from lf_hf import FusedLlamaForCausalLM, pipeline
from lf_hf.checkpoint.saving import only_writer
from lf_hf.text.hub import GENERAL

SETTINGS: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0}


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each fusion."""
    fuse, names = pipeline.fuse, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        names.append(kwargs["base"])
        return fuse(*args, **kwargs)

    monkeypatch.setattr(pipeline, "fuse", counted)
    return names


def load(base: str, fused_dir: Path, **kwargs: Any) -> FusedLlamaForCausalLM:
    arguments: dict[str, Any] = {"calibration": make_texts()} | SETTINGS | kwargs
    return FusedLlamaForCausalLM.from_pretrained_fused(base, fused_dir=fused_dir, **arguments)


def same(a: FusedLlamaForCausalLM, b: FusedLlamaForCausalLM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_was_fused_is_loaded(base: str, tmp_path: Path, fusions: list[str]) -> None:
    first = load(base, tmp_path / "fused")
    second = load(base, tmp_path / "fused")
    assert fusions == [base]
    assert same(first, second) and first.dtype == second.dtype and not second.training
    assert first.fusion_report == second.fusion_report and second.tokenizer is not None
    assert first.config.to_diff_dict() == second.config.to_diff_dict()
    assert same(first, FusedLlamaForCausalLM.from_pretrained(tmp_path / "fused"))


def test_a_base_is_known_by_content(base: str, tmp_path: Path, fusions: list[str]) -> None:
    load(base, tmp_path / "fused")
    shutil.copytree(base, tmp_path / "of another name")
    load(str(tmp_path / "of another name"), tmp_path / "fused")
    assert fusions == [base]


@pytest.mark.parametrize("arguments", [{"variant": "fp16"}, {"use_safetensors": False}, {"output_loading_info": True}])
def test_what_is_true_of_the_base_alone_does_not_matter_for_the_result(
    arguments: dict[str, Any], tmp_path: Path, fusions: list[str]
) -> None:
    base = tmp_path / "base"
    make_llama().save_pretrained(base, variant=arguments.get("variant"))
    make_tokenizer().save_pretrained(base)
    if "use_safetensors" in arguments:
        torch.save(make_llama().state_dict(), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    first, second = (load(str(base), tmp_path / "fused", **arguments) for _ in range(2))
    assert len(fusions) == 1 and same(first, second)


def with_other_weights(base: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(base)


def with_other_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


def tokenizer_with(normalizer: Any = None, template: str | None = None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.chat_template = template
    return tokenizer


CHANGES: dict[str, tuple[Callable[[Path], Any] | None, dict[str, Any], str]] = {
    "weights": (with_other_weights, {}, "was made with another base"),
    "config": (with_other_config, {}, "was made with another base"),
    "settings": (None, {"num_fusions": 1, "seed": 3}, "num_fusions=2 instead of 1, seed=0 instead of 3"),
    "calibration": (None, {"calibration": make_texts(seed=5)}, "was made with other calibration text"),
    "dtype": (None, {"dtype": "bfloat16"}, "was made with another dtype"),
    "tokenizer": (None, {"tokenizer": tokenizer_with(normalizer=normalizers.Replace("layer", "laier"))}, "tokenizer"),
    "chat template": (None, {"tokenizer": tokenizer_with(template="{{ messages[0].content }}")}, "tokenizer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_said_and_fused_again(
    change: str,
    base: str,
    tmp_path: Path,
    fusions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit, arguments, message = CHANGES[change]
    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
    shutil.copytree(base, tmp_path / "base")
    load(str(tmp_path / "base"), tmp_path / "fused")
    assert caplog.messages == []
    if edit:
        edit(tmp_path / "base")
    again = load(str(tmp_path / "base"), tmp_path / "fused", **arguments)
    assert len(fusions) == 2
    assert [text for text in caplog.messages if message in text and text.endswith("Fusing, to replace it.")]
    assert same(again, load(str(tmp_path / "base"), tmp_path / "fused", **arguments)) and len(fusions) == 2


def test_what_changes_the_base_while_it_loads_is_noticed(base: str, tmp_path: Path, fusions: list[str]) -> None:
    first, other = load(base, tmp_path / "fused"), load(base, tmp_path / "fused", rms_norm_eps=0.5)
    assert fusions == [base, base] and other.config.rms_norm_eps == 0.5 != first.config.rms_norm_eps
    load(base, tmp_path / "fused", rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert fusions == [base] * 3


def test_what_another_run_replaces_while_it_is_read_is_not_used(
    base: str, tmp_path: Path, fusions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, others = load(base, tmp_path / "fused"), iter([1])

    from_pretrained = FusedLlamaForCausalLM.from_pretrained

    def after_another_run(*args: Any, **kwargs: Any) -> Any:
        for count in others:
            load(base, tmp_path / "fused", num_fusions=count)
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(FusedLlamaForCausalLM, "from_pretrained", after_another_run)
    assert same(load(base, tmp_path / "fused"), first) and len(fusions) == 3


@pytest.mark.parametrize(("answers_first", "heal_tokens"), [(True, 1024), (False, 0)])
def test_the_default_text_is_the_same_with_and_without_a_hub(
    answers_first: bool,
    heal_tokens: int,
    base: str,
    tmp_path: Path,
    fusions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So what took long, as a healing, is not replaced where the hub answers now and did not then, or the reverse."""
    pages = cached_assets_path("lf_hf", GENERAL.repo, GENERAL.commit, assets_dir=tmp_path) / "000_00000.json"
    pages.write_text(json.dumps([{"text": " ".join(make_texts(400))}]))
    settings: dict[str, Any] = {"calibration": None, "method": "refit", "perplexity_tokens": 200}
    settings |= {"calibration_tokens": 1024, "calibration_length": 64, "heal_tokens": heal_tokens}
    models = []
    for answers in (answers_first, not answers_first):
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "lf_hf"):
            patch.setattr(logging.getLogger("lf_hf"), "propagate", True)
            patch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path if answers else os.devnull)
            caplog.clear()
            models.append(load(base, tmp_path / "fused", **settings))
    assert len(fusions) == 1 and same(*models)
    [line] = [message for message in caplog.messages if "what was fused before, on" in message]
    assert ("HuggingFaceFW/fineweb-edu at" in line) == answers_first
    for changes in ({"calibration": "bundled"}, {"tokenizer": tokenizer_with(template="{{ messages[0].content }}")}):
        load(base, tmp_path / "fused", **settings | changes | {"heal_tokens": 0})
    assert len(fusions) == 3


def test_what_was_healed_since_is_not_replaced(base: str, tmp_path: Path, fusions: list[str]) -> None:
    load(base, tmp_path / "fused")
    settings: dict[str, Any] = {"tokens": 1024, "length": 64, "batch_tokens": 256, "training_args": {"bf16": False}}
    lf_hf.heal(tmp_path / "fused", tmp_path / "healed", base=base, text=make_texts(1200), **settings)
    before = (tmp_path / "healed" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a healed model that does not say by content what it was made of"):
        load(base, tmp_path / "healed")
    assert fusions == [base] and (tmp_path / "healed" / "model.safetensors").read_bytes() == before


def test_what_is_finished_loads_at_once(base: str, fusions: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """From a disk that cannot be written, and while another process holds the folder's lock."""
    with tempfile.TemporaryDirectory() as name:
        fused = Path(name) / "fused"
        shutil.copytree(base, Path(name) / "base")
        first = load(str(Path(name) / "base"), fused)
        with only_writer(fused):
            assert same(first, load(str(Path(name) / "base"), fused))
        for path in Path(name).rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        Path(name).chmod(0o555)
        with no_privileges():
            assert same(first, load(str(Path(name) / "base"), fused))
        for path in (Path(name), *Path(name).iterdir()):
            path.chmod(0o755)
    assert len(fusions) == 1


def test_a_fusion_that_fails_leaves_the_folder_to_the_next(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fuse", fail)
        with pytest.raises(MemoryError, match="no room"):
            load(base, tmp_path / "fused")
    assert load(base, tmp_path / "fused").num_parameters()


def test_processes_that_start_at_once_fuse_once(base: str, tmp_path: Path) -> None:
    code = """if True:
        import json, sys
        from lf_hf import FusedLlamaForCausalLM, pipeline
        fuse, count = pipeline.fuse, []
        pipeline.fuse = lambda *args, **kwargs: count.append(1) or fuse(*args, **kwargs)
        settings = {"num_fusions": 2, "method": "truncate", "perplexity_tokens": 0, "fused_dir": sys.argv[2]}
        model = FusedLlamaForCausalLM.from_pretrained_fused(sys.argv[1], **settings)
        print(json.dumps([len(count), sum(parameter.double().sum().item() for parameter in model.parameters())]))
        """
    command = [sys.executable, "-c", code, base, str(tmp_path / "fused")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    (first, a), (second, b) = (json.loads(process.communicate()[0].splitlines()[-1]) for process in both)
    assert first + second == 1 and a == b
