"""Checkpoints: what is read of a base, and that in memory, layer by layer and on a device the same bits are written."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_DISK, QUICK, make_llama, make_texts, pickled, same, tensors
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.weights import local_folder

SETTINGS: dict[str, Any] = {"num_fusions": 2, "calibration": make_texts(), "perplexity_tokens": 0}
SETTINGS |= {"method": "refit", "calibration_length": 32, "calibration_tokens": 1024}
OUTER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
LAYERS = {f"model.layers.{n}": "cpu" for n in range(6)}


def fuse(base: str | Path, out: Path, **kwargs: Any) -> FusionReport:
    return fuse_checkpoint(base, out, **SETTINGS | kwargs)


WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "neural_alignment"}, {"attention_bias": True, "mlp_bias": True}),
    ({"perplexity_tokens": 200}, {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
    ({"num_fusions": None, "max_divergence": 0.3}, {"num_hidden_layers": 6}),
]


@pytest.mark.parametrize(("settings", "overrides"), WAYS)
def test_every_path_writes_the_same_tensors(
    settings: dict[str, Any],
    overrides: dict[str, Any],
    make_base: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the base comes in shards, and however a device map puts it into memory."""
    low, high, sharded = (tmp_path / name for name in ("low", "high", "sharded"))
    base = make_base(**overrides)
    shutil.copytree(base, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    make_llama(**overrides).save_pretrained(sharded, max_shard_size="40KB")
    monkeypatch.setattr("lf_hf.pipeline.run.MAX_SHARD_BYTES", 30_000)
    high_report = fuse(base, high, device_map=OUTER | LAYERS, **settings)
    low_report = fuse(sharded, low, **settings, **ON_DISK)
    assert min(len(list(folder.glob("model-*.safetensors"))) for folder in (low, sharded)) > 1
    assert same(tensors(low), tensors(high))
    assert (low / "config.json").read_text() == (high / "config.json").read_text()
    # A model on disk would be read for each token of the continuations.
    found: dict[str, Any] = {"seconds": None, "continuations": [], "base": "", "fingerprints": None}
    assert low_report.to_dict() | found == high_report.to_dict() | found
    if "method" not in settings:
        assert low_report.calibration[0].source.endswith("text by the model itself")
    assert {path.name for path in tmp_path.iterdir()} == {"low", "high", "sharded"}


def test_both_paths_write_the_same_settings_for_generation(base: str, tmp_path: Path) -> None:
    """Also those that older checkpoints have in config.json; what cannot be saved is said before the work."""
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 0.5, "max_length": 50}))
    found = []
    for placed in (ON_DISK, {}):
        fuse(copy, tmp_path / "out", method="truncate", overwrite=True, **placed)
        found.append(json.loads((tmp_path / "out" / "generation_config.json").read_text()))
    assert found[0] == found[1] and found[0]["temperature"] == 0.5
    published = {"temperature": 0.9, "top_p": 0.6}  # without do_sample, as of a Vicuna
    (copy / "generation_config.json").write_text(json.dumps(published))
    assert fuse(copy, tmp_path / "out", method="truncate", overwrite=True, revision="v2").revision == "v2"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()).items() >= published.items()
    (copy / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config.json of .* cannot be used"):
        fuse(copy, tmp_path / "out", method="truncate", overwrite=True)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_differs_is_kept(equal: bool, make_base: Callable[..., str], tmp_path: Path) -> None:
    base, low, high = Path(make_base(tie_word_embeddings=True)), tmp_path / "low", tmp_path / "high"
    held = tensors(base)
    head = held["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(held | {"lm_head.weight": head.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    one = fuse(base, low, perplexity_tokens=200, **ON_DISK)
    other = fuse(base, high, perplexity_tokens=200)
    assert same(tensors(low), tensors(high)) and ("lm_head.weight" in tensors(low)) != equal
    assert one.perplexities == other.perplexities and one.perplexities
    assert other.continuations and not one.continuations
    if not equal:
        settings: dict[str, Any] = {"text": make_texts(1200), "tokens": 1024, "length": 64, "batch_tokens": 256}
        lf_hf.heal(low, tmp_path / "healed", base=base, **settings, training_args={"bf16": False})
        assert torch.equal(tensors(tmp_path / "healed")["lm_head.weight"], head)


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fuse(base, folder)
    return folder


PARTS = OUTER | LAYERS | {"model.layers.0": "disk", "model.layers.3": "disk", "lm_head": "disk"}


def test_weights_lie_where_accelerate_puts_them(base: str, whole: Path, tmp_path: Path) -> None:
    settings, folder = SETTINGS, tmp_path / "offload"
    given: dict[str, Any] = {"device_map": PARTS, "offload_folder": folder}
    digest = FusionReport.load(whole).weights_digest
    assert fuse_checkpoint(base, tmp_path / "out", **settings, **given).weights_digest == digest
    assert same(tensors(tmp_path / "out"), tensors(whole))
    model: Any = lf_hf.from_pretrained_fused(base, **settings, **given)
    assert any(parameter.is_meta for parameter in model.parameters())
    prompt = torch.tensor([[9, 31, 5]])
    expected: Any = lf_hf.FusedLlamaForCausalLM.from_pretrained(whole)
    written = [either.generate(prompt, max_new_tokens=4, do_sample=False) for either in (model, expected)]
    assert torch.equal(*written)
    model.save_pretrained(tmp_path / "saved", plain=True)
    assert same(tensors(tmp_path / "saved"), tensors(whole))
    assert FusionReport.load(tmp_path / "saved").weights_digest == digest
    placed_again: dict[str, Any] = {"device_map": OUTER | LAYERS | {"model.layers.1": "disk"}, "offload_folder": folder}
    again = lf_hf.FusedLlamaForCausalLM.from_pretrained(tmp_path / "saved", **placed_again)
    assert again.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(again.generate(prompt, max_new_tokens=4, do_sample=False), written[0])
    again.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(whole))
    del model, again
    gc.collect()
    assert not list(folder.glob("*"))


Fuse = Callable[..., Any]
UP = "model.layers.1.mlp.up_proj.weight"


def in_memory(base: str | Path, out: Path, **kwargs: Any) -> None:
    FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK | kwargs).save_pretrained(out)


def from_folder_to_folder(base: str | Path, out: Path, **kwargs: Any) -> None:
    fuse_checkpoint(base, out, **QUICK | ON_DISK | kwargs)


both = pytest.mark.parametrize("fuse", [in_memory, from_folder_to_folder])
either_class = pytest.mark.parametrize("kind", [FusedLlamaForCausalLM, AutoModelForCausalLM])


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.fixture
def copy(base: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture
def saved(fused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fused, tmp_path / "fused"))


@both
def test_code_in_a_repository_runs_only_when_asked_for(fuse: Fuse, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): ...\n"
        "class Tokenizer(PreTrainedTokenizerFast): ...\n"
    )
    edit_json(copy / "config.json", auto_map={"AutoConfig": "own.Config"})
    edit_json(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})
    fuse(copy, tmp_path / "out")
    assert not marker.exists()
    AutoTokenizer.from_pretrained(copy, trust_remote_code=True)
    assert marker.exists()  # so it could have
    marker.unlink()

    edit_json(copy / "tokenizer_config.json", tokenizer_class="Own")
    edit_json(copy / "config.json", model_type="own")
    with pytest.raises(ValueError, match=r"No config of a model can be read for .*contains custom code"):
        fuse(copy, tmp_path / "new")
    assert not marker.exists() and not (tmp_path / "new").exists()


def test_pickled_weights_are_read_only_when_asked_for(copy: Path, fused: Path, tmp_path: Path) -> None:
    pickled(copy)
    for given in (None, True):
        with pytest.raises(ValueError, match=r"pickled weights, which can run code .* use_safetensors=False"):
            in_memory(copy, tmp_path / "out", use_safetensors=given)
    in_memory(copy, tmp_path / "out", use_safetensors=False)
    assert same(tensors(tmp_path / "out"), tensors(fused))
    pickled(tmp_path / "out")
    for kind in (FusedLlamaForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            kind.from_pretrained(tmp_path / "out")
        assert same(kind.from_pretrained(tmp_path / "out", use_safetensors=False), tensors(fused))


@either_class
def test_an_index_of_a_fused_checkpoint_names_its_own_files_alone(kind: Any, saved: Path, fused: Path) -> None:
    (saved / "model.safetensors").unlink()
    for shard in ("../fused/model.safetensors", "sub/model.safetensors", "model.bin", ""):
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(fused), shard)}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="only safetensors files in its own folder are read"):
            kind.from_pretrained(saved)
    shutil.copy(fused / "model.safetensors", saved)  # beside which no index is looked at
    kind.from_pretrained(saved)


def test_links_are_followed_as_in_the_hub_cache(base: str, fused: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--some--model"
    snapshot = home / "snapshots" / "0123"
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0123")
    for number, file in enumerate(Path(base).iterdir()):
        shutil.copy(file, home / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for fuse in (in_memory, from_folder_to_folder):
        fuse("some/model", tmp_path / fuse.__name__, cache_dir=str(tmp_path))
        assert same(tensors(tmp_path / fuse.__name__), tensors(fused))
    (tmp_path / "links").mkdir()
    for file in fused.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert FusedLlamaForCausalLM.from_pretrained(tmp_path / "links").fusion_report is not None


@either_class
@pytest.mark.parametrize("content", ["", '{"base": 3}', "\xff"])
def test_weights_load_beside_a_damaged_report(
    content: str, kind: Any, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / "fusion_report.json").write_text(content, encoding="latin-1")
    assert kind.from_pretrained(saved).fusion_report is None
    [warning] = [message for message in caplog.messages if "fusion_report.json" in message]
    assert warning.endswith("; the model is loaded without its report.") and "\n" not in warning
    with pytest.raises(ValueError, match=r"fusion_report\.json"):
        FusionReport.load(saved)


def test_a_layer_is_fitted_to_two_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"dtype": "bfloat16", "num_fusions": 1, "method": "refit"}
    given |= {"selection": "least_influence", "calibration_tokens": 1024}
    report = fuse_checkpoint(smollm2, tmp_path, perplexity_tokens=128, **given)
    assert [layer.layers for layer in report.fused_layers] == [[24, 25]]
    for text in report.perplexities:
        assert text.dense < text.fused < 1.2 * text.dense
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    assert stock.num_parameters() == report.parameters_after == 134_515_008 - 3_540_096


@pytest.mark.parametrize("subfolder", ["", "half/"])
def test_only_files_of_the_model_are_fetched(subfolder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of checkpoints of its training, nor what Mistral publishes a second time."""
    own = [f"{subfolder}{name}" for name in ("config.json", "model-00001-of-00002.safetensors")]
    others = ["checkpoint-500/model.safetensors", "consolidated.safetensors", "optimizer.pt", "original/params.json"]
    names = [*own, *(f"{subfolder}{name}" for name in others), "half/more/model.safetensors"]
    fetched: list[str] = []

    def download(base: str, **patterns: Any) -> str:
        fetched.extend(filter_repo_objects(names, **patterns))
        return str(tmp_path)

    monkeypatch.setattr("lf_hf.checkpoint.weights.snapshot_download", download)
    hub = {"subfolder": subfolder} if subfolder else {}
    assert local_folder("owner/model", hub, ["*.safetensors*", "*.json"]) == tmp_path / subfolder
    assert fetched == own
