"""Fused models of every family: in memory, in files, with pictures, and what other programs make of them."""

import copy
import functools
import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_DISK, QUICK, changed, dry_run, make_texts, make_tokenizer, same, save_base, tensors
from safetensors.torch import save_file
from tiny_models import SETTINGS as FAMILY_SETTINGS
from tiny_models import WRAPPED, auto_class, idle, picture, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

import lf_hf
from lf_hf import FusionReport
from lf_hf.checkpoint.base import Base
from lf_hf.evaluate.sweep import sweep
from lf_hf.families.models import WRAPPERS, model_class, text_model, text_prefix
from lf_hf.families.table import FAMILIES
from lf_hf.settings import FusionConfig

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44, 8, 90]])
SETTINGS: dict[str, Any] = {"num_fusions": 2, "method": "refit", "selection": "last", "perplexity_tokens": 0}
SETTINGS |= {"calibration_tokens": 1024, "calibration_length": 16, "calibration": ["\n".join(make_texts(200, seed=3))]}


def logits(model: Any, **given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**given or {"input_ids": IDS}).logits


def settings_of(model_type: str) -> dict[str, Any]:
    """Settings with which layers 3 to 5 become one, or 2 to 4 where the last one stays as it is."""
    return SETTINGS | {"selection": "least_influence"} if model_type.startswith("gemma4") else SETTINGS


FusedOf = Callable[[str], Any]


@pytest.fixture(scope="module")
def fused(family_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> FusedOf:
    """A fused model of a family, which tests only read, of the name of the folder that it was kept in."""

    @functools.cache
    def fuse(model_type: str) -> Any:
        folder = tmp_path_factory.mktemp("fused") / model_type
        return lf_hf.from_pretrained_fused(family_base(model_type), fused_dir=folder, **settings_of(model_type))

    return fuse


# One of each way in which layers are stored: several projections in one piece, experts one by one or in one piece, and
# decoders inside a model of images, under two kinds of names.
STORED = ["phi3", "mixtral", "gpt_oss", "gemma3", "qwen3_vl"]
KEPT = ["llama", "qwen3_5_text", *STORED]


@pytest.mark.parametrize("model_type", KEPT)
def test_a_fused_model_and_its_folder(model_type: str, family_base: Callable[..., Path], fused: FusedOf) -> None:
    """It is one of its family; what is kept is plain, and the same as in memory."""
    model = fused(model_type)
    folder = Path(model.name_or_path)
    stock, decoder = model_class(tiny_config(model_type)), text_model(model)
    assert isinstance(model, stock) and len(decoder.layers) == decoder.config.num_hidden_layers == 4
    assert decoder.config is model.config.get_text_config()
    dense = stock.from_pretrained(family_base(model_type)).state_dict()
    weights = model.state_dict().items()
    fitted = {name for name, tensor in weights if name not in dense or not torch.equal(tensor, dense[name])}
    report = FusionReport.load(folder)
    assert fitted or report.fused_layers[0].layer_instead == 3
    if settings_of(model_type) == SETTINGS:
        assert all(f"{text_prefix(model)}layers.3." in name for name in fitted)
    assert report == model.fusion_report and report.layers_after == 4
    card = (folder / "README.md").read_text()
    assert f" {stock.__name__.partition('For')[0]} with 4 layers, fused from 6" in card and f"- {model_type}\n" in card

    again = lf_hf.from_pretrained_fused(family_base(model_type), fused_dir=folder, **settings_of(model_type))
    assert again.fusion_report == report and same(again, model)
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model)(model.config).eval()):
        twin.load_state_dict(model.state_dict())
        assert type(twin) is type(model)
        torch.testing.assert_close(logits(twin), logits(model))  # kernels of experts go by where weights lie
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(IDS, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape[1] == IDS.shape[1] + 4
    text = torch.arange(IDS.shape[1])[None] >= torch.tensor([[0], [4]])  # the second text is shorter
    padded = model.generate(torch.where(text, IDS, 1), attention_mask=text.long(), **settings)
    assert torch.equal(padded[:1], cached)
    assert torch.equal(padded[1:, 4:], model.generate(IDS[:, 4:], **settings))


@pytest.mark.parametrize("model_type", STORED)
def test_files_layer_by_layer(
    model_type: str, family_base: Callable[..., Path], fused: FusedOf, tmp_path: Path
) -> None:
    folder = Path(fused(model_type).name_or_path)
    low = lf_hf.fuse_checkpoint(family_base(model_type), tmp_path, **settings_of(model_type), **ON_DISK)
    report = FusionReport.load(folder)
    assert (low.base_digest, low.weights_digest) == (report.base_digest, report.weights_digest)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert same(tensors(tmp_path), tensors(folder))


def test_the_text_of_a_model_of_images_is_fused_and_the_rest_is_left_out(tmp_path: Path) -> None:
    """As AutoModelForCausalLM reads Qwen 3.5, whose files have more; names in files are those of a model of text."""
    text = tiny_model("qwen3_5_text")
    images = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text.config.to_dict(), vision_config=images)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    base, low = tmp_path / "base", tmp_path / "low"
    save_base(base, whole)
    save_file(tensors(base) | {"mtp.fc.weight": torch.ones(3, 2)}, base / "model.safetensors", {"format": "pt"})
    model: Any = lf_hf.from_pretrained_fused(base, **QUICK)
    model.save_pretrained(tmp_path / "high")
    lf_hf.fuse_checkpoint(base, low, **QUICK, **ON_DISK)
    for folder in ("low", "high"):
        notes = FusionReport.load(tmp_path / folder).notes
        assert any("mtp.*, model.visual.* are left out" in note for note in notes)
    assert same(tensors(low), tensors(tmp_path / "high")) and tensors(low).keys() == model.state_dict().keys()
    del text.model.layers[5]
    text.config.layer_types = text.config.layer_types[:5]
    for fused in (model, auto_class("qwen3_5_text").from_pretrained(low)):
        assert torch.equal(logits(fused), logits(text))


WITHOUT_LF_HF = """
import sys, torch
class NoLfHf:
    def find_spec(self, name, path=None, target=None):
        if name == "lf_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoLfHf())
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
ids, out, *folders = sys.argv[1:]
computed = {}
for folder in folders:
    name = folder.rpartition("/")[2]
    auto_class = AutoModelForImageTextToText if name in WRAPPERS else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(map(len, info.values())), info
    assert AutoTokenizer.from_pretrained(folder)("layer model").input_ids
    with torch.no_grad():
        computed[name] = type(model).__name__, model(torch.load(ids)).logits
assert "lf_hf" not in sys.modules
torch.save(computed, out)
"""


def test_stock_transformers_opens_them(fused: FusedOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(IDS, "ids.pt")
    folders = [fused(model_type).name_or_path for model_type in KEPT]
    command = [sys.executable, "-c", WITHOUT_LF_HF.replace("WRAPPERS", repr(WRAPPERS)), "ids.pt", "out.pt", *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for model_type, (name, found) in torch.load("out.pt").items():
        assert name == model_class(tiny_config(model_type)).__name__
        assert torch.equal(found, logits(fused(model_type)))


# What a config has beside what transformers 5 writes into one of the same shape.
ROPE = {"rope_theta": 10000.0, "rope_scaling": None}
BY_TYPE = {"rope_local_base_freq": 5e5, "sliding_window_pattern": 4}
OLDER: dict[str, dict[str, Any]] = {
    "phi3": ROPE | {"partial_rotary_factor": 1.0},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": None},
    "smollm3": ROPE | {"rope_theta": 2e6},
    "ernie4_5": ROPE | {"rope_theta": 5e5},
    "glm4": ROPE | {"partial_rotary_factor": 0.5},
    "olmo3": ROPE | {"rope_theta": 5e5} | (BY_TYPE if FAMILIES["olmo3"].rotary_of_type else {}),
    "qwen3_5_text": ROPE | {"partial_rotary_factor": 0.5},
    "qwen3_5_moe_text": ROPE | {"partial_rotary_factor": 0.5},
    "mixtral": ROPE | {"rope_theta": 1e6},
}
for name, settings in FAMILY_SETTINGS.items():
    scaling = dict(settings.get("rope_parameters", {}))
    if scaling.get("rope_type", "default") != "default":
        OLDER[name] = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
OLDER |= {name: {"text_config": OLDER.get(decoder, ROPE)} for name, (decoder, _) in WRAPPED.items()}


OF_OWN_KEYS = ["llama", *(name for name in OLDER if not name.startswith("gemma4"))]  # of which the last layer stays
SHORT = {"original_max_position_embeddings": 64}
SCALED: dict[str, dict[str, Any]] = {
    "phi3": {"type": "longrope", "long_factor": [1.5] * 3, "short_factor": [1.1] * 3},  # it refused more than three
    "llama": SHORT | {"rope_type": "longrope", "factor": 8.0, "long_factor": [1.5] * 4, "short_factor": [1.1] * 4},
    "qwen2": SHORT | {"rope_type": "yarn", "factor": 4.0},
    "gemma3_text": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize(("model_type", "rope"), [*((name, None) for name in OF_OWN_KEYS), *SCALED.items()])
def test_the_config_of_a_plain_checkpoint_key_by_key(
    model_type: str, rope: dict[str, Any] | None, family_base: Callable[..., Path], tmp_path: Path
) -> None:
    """It is the stock config of a model of its shape, with old names beside new ones, and names no code of its base."""
    asked: dict[str, Any] = {"rope_scaling": rope, "rope_theta": 5000.0} if rope else {}
    if rope and model_type == "phi3":
        asked |= SHORT | {"partial_rotary_factor": 0.75}
    base = family_base(model_type, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, **copy.deepcopy(asked))
    model = lf_hf.from_pretrained_fused(base, trust_remote_code=True, **QUICK)
    model.save_pretrained(tmp_path / "plain", plain=True)
    # The first five layers of the base, which are those that are left.
    tiny_model(model_type, num_hidden_layers=5, **copy.deepcopy(asked)).save_pretrained(tmp_path / "stock")
    plain, stock = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "stock"))
    older = dict(OLDER.get(model_type, ROPE))
    if text := older.pop("text_config", None):
        stock["text_config"] |= text | {"dtype": "float32", "torch_dtype": "float32"}
        stock["vision_config"] |= {"dtype": "float32"}
    assert plain == stock | older | asked | {"torch_dtype": "float32"}
    torch.testing.assert_close(logits(auto_class(model_type).from_pretrained(tmp_path / "plain")), logits(model))


def test_an_expert_that_lacks_a_matrix_is_a_base_to_repair(family_base: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(family_base("mixtral"), tmp_path / "base")
    held = tensors(base)
    del held["model.layers.2.block_sparse_moe.experts.3.w1.weight"]
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded .*; check the arguments and its files"):
        lf_hf.fuse_checkpoint(base, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    family_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen3, gemma2, fuse = family_base("qwen3"), family_base("gemma2"), lf_hf.from_pretrained_fused
    fuse(qwen3, **QUICK).save_pretrained(tmp_path / "fused")
    monkeypatch.delattr(Base, "load")
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts()))
    swept: dict[str, Any] = {"num_fusions": [2], "methods": ["refit", "mka"], "tasks": ["piqa"]}
    swept |= {"calibration": tmp_path / "text.txt"}
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: lf_hf.FusedLlamaForCausalLM.from_pretrained(tmp_path / "fused"), "load it with AutoModelForCausalLM"),
        (lambda: fuse(qwen3, attn_implementation="flex_attention", **QUICK), "flex_attention"),
        (lambda: fuse(gemma2, num_fusions=2, method="mka"), "Only layers of one kind are averaged"),
        (lambda: dry_run(gemma2, FusionConfig(2, "mka")), "Only layers of one kind are averaged"),
        (lambda: sweep(gemma2, tmp_path / "sweep", **swept), "Only layers of one kind are averaged"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


ORDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": ("layer_types", {"sliding_window_pattern": 6}),
    "qwen3_5_text": ("layer_types", {"full_attention_interval": 4}),
    "smollm3": ("layer_types, no_rope_layers", {}),
}


@pytest.mark.parametrize("model_type", ORDERS)
def test_another_order_is_pointed_out(
    model_type: str, family_base: Callable[..., Path], tmp_path: Path, caplog: Any
) -> None:
    """llama.cpp knows where such families have which kind of layer, and does not read it from the config."""
    lists, usual = ORDERS[model_type]
    moved = {name: getattr(tiny_config(model_type).get_text_config(), name)[::-1] for name in lists.split(", ")}
    said = f"The kinds of this model's layers ({lists}) are in an order of their own"
    for base, told in ((family_base(model_type, **moved), True), (family_base(model_type, **usual), False)):
        caplog.clear()
        lf_hf.from_pretrained_fused(base, **QUICK).save_pretrained(tmp_path, plain=True)
        card = " ".join((tmp_path / "README.md").read_text().replace("\\", "").split())
        assert (said in card) == told == any(said in message for message in caplog.messages)
        if model_type == "gemma3_text":  # transformers before 4.53 would count by it, and fails without a number
            config = json.loads((tmp_path / "config.json").read_text())
            assert config["sliding_window_pattern"] == (None if told else 6)  # any beyond the 5 layers


def test_the_sentencepiece_model_goes_along(family_base: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp's converter makes the tokenizers of Phi 3 and Gemma 2 of nothing else."""
    base = Path(shutil.copytree(family_base("gemma2"), tmp_path / "base"))
    (base / "tokenizer.model").write_bytes(b"a sentencepiece model")
    for _ in range(2):
        lf_hf.from_pretrained_fused(base, fused_dir=tmp_path / "kept", **QUICK).save_pretrained(tmp_path / "saved")
    lf_hf.fuse_checkpoint(base, tmp_path / "written", **QUICK)
    for folder in ("kept", "saved", "written"):
        assert (tmp_path / folder / "tokenizer.model").read_bytes() == b"a sentencepiece model"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("layer").input_ids


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_moe"])
def test_healing_comes_nearer(
    model_type: str,
    family_base: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the state that was the best, whose weights are loaded by the names that they were saved with."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # whose Trainer says what it misses
    base, out = family_base(model_type), tmp_path / "out"
    lf_hf.fuse_checkpoint(base, tmp_path / "fused", **QUICK | {"num_fusions": 2, "perplexity_tokens": 512})
    given: dict[str, Any] = {"tokens": 2048, "length": 32, "batch_tokens": 128, "learning_rate": 2e-4}
    given["train"] = "all" if model_type == "gemma3" else "lora"
    report: Any = lf_hf.heal(tmp_path / "fused", out, base=base, text=make_texts(2000), **given)
    assert " keys in the checkpoint" not in caplog.text
    for before, after in zip(report.healed.judged, report.perplexities, strict=True):
        assert after.figures["divergence"] < before.figures["divergence"]
    names = changed(tmp_path / "fused", out)
    assert names and not any("vision" in name or "visual" in name or "projector" in name for name in names)
    assert type(AutoConfig.from_pretrained(out)) is type(AutoConfig.from_pretrained(base))


ONE: dict[str, Any] = SETTINGS | {"num_fusions": 1}


@pytest.mark.parametrize(("model_type", "placed"), [("gemma3", {}), ("qwen3_vl", ON_DISK)])
def test_a_picture_without_a_layer_that_did_nothing(model_type: str, placed: dict[str, Any], tmp_path: Path) -> None:
    """The layer that has no influence is the one that goes, so features of images still come after the same ones."""
    dense = tiny_model(model_type)
    idle(dense, 3)  # above layer 2, where it may be in a group with the layer below it in all of these models
    base = save_base(tmp_path / "base", dense)
    settings = ONE | {"method": "truncate", "selection": "least_influence"} | placed
    report = lf_hf.fuse_checkpoint(base, tmp_path / "fused", **settings)
    assert report.pairs == [(2, 3)]
    fused = AutoModelForImageTextToText.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(logits(fused, **picture(model_type)), logits(dense, **picture(model_type)))
    assert fused.config.get_text_config().num_hidden_layers == 5
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    said, expected = (model.generate(**picture(model_type), **asked) for model in (fused, dense))
    assert said.shape == (1, 16) and torch.equal(said, expected)


def test_all_but_the_fused_layers_stays_bit_for_bit_under_the_names_of_the_base(tmp_path: Path) -> None:
    """Here those of models in memory."""
    base = tmp_path / "base"
    tiny_model("gemma3").save_pretrained(base, save_original_format=False)
    make_tokenizer().save_pretrained(base)
    lf_hf.fuse_checkpoint(base, tmp_path / "fused", **ONE, **ON_DISK)
    before, after = tensors(base), tensors(tmp_path / "fused")
    layers = next(name for name in before if name.endswith("layers.0.mlp.down_proj.weight")).partition("0.mlp")[0]
    gone = {name for name in before if name.startswith(f"{layers}5.")}
    assert after.keys() == before.keys() - gone
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != name.startswith(f"{layers}4.")
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(map(len, loaded[1].values()))


def test_a_picture_and_a_question_go_through_the_processor_of_the_base(tmp_path: Path) -> None:
    image_processor = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    tokenizer = make_tokenizer()
    of_images = {"image_token": 5, "boi_token": 6, "eoi_token": 7}
    named = {name: tokenizer.convert_ids_to_tokens(number) for name, number in of_images.items()}
    given: dict[str, Any] = {"pad_token": "</s>", "extra_special_tokens": named}
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **given)
    pixels = image_processor.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    base = save_base(tmp_path / "base", tiny_model("gemma3"), words)
    Gemma3Processor(pixels, words, image_seq_length=4).save_pretrained(base)
    file = Path(base, "processor_config.json").read_bytes()
    lf_hf.fuse_checkpoint(base, tmp_path / "written", **QUICK)
    lf_hf.from_pretrained_fused(base, fused_dir=tmp_path / "kept", **QUICK)
    again = lf_hf.from_pretrained_fused(base, fused_dir=tmp_path / "kept", **QUICK)
    again.save_pretrained(tmp_path / "saved")
    for name in ("written", "kept", "saved"):
        assert (tmp_path / name / "processor_config.json").read_bytes() == file
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    drawn = torch.zeros(20, 30, 3, dtype=torch.uint8)
    drawn[5:15, 8:22] = 255
    asked = processor(images=[drawn.numpy()], text=f"layer {named['boi_token']} model", return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert model.generate(**asked, max_new_tokens=4, eos_token_id=None).shape[1] == asked["input_ids"].shape[1] + 4
    card = (tmp_path / "saved" / "README.md").read_text()
    for said in ("AutoProcessor", "AutoModelForImageTextToText", "nothing was measured on images"):
        assert said in card


@pytest.mark.parametrize(("selection", "most"), [("last", 3), ("groups", 2), ("least_influence", 2)])
def test_fusions_that_would_need_those_layers_are_refused_first(
    selection: str, most: int, family_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Base, "load")
    said = rf"num_fusions must be 1 to {most} for a model of 6 layers \(of which features of images need the first 2"
    given = ONE | {"selection": selection, "num_fusions": most + 1}
    with pytest.raises(ValueError, match=said):
        lf_hf.from_pretrained_fused(family_base("qwen3_vl"), **given)
