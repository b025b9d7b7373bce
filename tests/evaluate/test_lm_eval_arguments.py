"""Arguments of `lm_eval --model fused_llama`: what is wrong is said before the model is loaded, and the rest passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts, make_tokenizer
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from lf_hf import FusedLlamaForCausalLM
from lf_hf.evaluate.lm_eval_model import FusedLlamaLM

QUICK: dict[str, Any] = {"num_fusions": 2, "method": "truncate", "perplexity_tokens": 0}


@pytest.fixture(scope="module")
def saved(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("fused") / "model")
    FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK).save_pretrained(folder)
    return folder


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setattr(FusedLlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("num_fusion=1", "Unknown argument 'num_fusion'; did you mean 'num_fusions'?"),
        ("num_fusions=1,batchsize=4", "Unknown argument 'batchsize'; did you mean 'batch_size'?"),
        ("num_fusions=1,calibraton=x.txt", "Unknown argument 'calibraton'; did you mean 'calibration'?"),
        ("attn_implementatoin=eager", "Unknown argument 'attn_implementatoin'; did you mean 'attn_implementation'?"),
        ("batch_size=0", "batch_size must be an integer of at least 1, auto, or auto:N, got 0"),
        ("num_fusions=1,batch_size=many", "batch_size must be an integer of at least 1, auto, or auto:N, got 'many'"),
        ("peft=no/where", "Can't find 'adapter_config.json' at 'no/where'"),
        ("num_fusions=1,peft={base}", "Can't find 'adapter_config.json' at "),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(arguments: str, message: str, base: str, saved: str) -> None:
    if "peft" in arguments:
        pytest.importorskip("peft")
    name = base if "num_fusions" in arguments else saved
    given = f"pretrained={name},perplexity_tokens=0,method=truncate," if name == base else f"pretrained={name},"
    with pytest.raises(ValueError, match=r".") as error:
        FusedLlamaLM.create_from_arg_string(given + arguments.format(base=base), {"device": "cpu"})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", ["", "num_fusions=1", "device=cpu,batch_size=2"])
def test_a_call_without_a_model_gets_one_sentence(arguments: str) -> None:
    with pytest.raises(ValueError, match="pretrained is missing; give pretrained=NAME, a base to fuse"):
        FusedLlamaLM.create_from_arg_string(arguments, None)


PASSING = (
    "attn_implementation=eager,low_cpu_mem_usage=True,use_cache=False,weights_only=True,max_length=64,logits_cache=0"
)


@pytest.mark.parametrize("fusing", [True, False])
def test_arguments_of_transformers_and_lm_eval_pass(fusing: bool, base: str, saved: str) -> None:
    given = f"pretrained={base},num_fusions=2,method=truncate,perplexity_tokens=0" if fusing else f"pretrained={saved}"
    options = {"device": "cpu", "batch_size": "auto:2", "max_batch_size": 2}
    lm = FusedLlamaLM.create_from_arg_string(f"{given},dtype=float,{PASSING}", options)
    assert lm.model.config._attn_implementation == "eager" and lm.model.config.use_cache is False
    assert lm.model.dtype == torch.float32 and lm.max_length == 64


class StartingTokenizers:
    """Tokenizers of the base, with and without a start token of their own, as lm-eval asks for them."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []

    def __call__(self, name: str, *_: Any, add_bos_token: bool | None = None, **__: Any) -> Any:
        tokenizer = make_tokenizer()
        if add_bos_token:
            tokenizer.bos_token = "layer"
        self.loaded.append(tokenizer)
        return tokenizer


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_start_token_in_the_evaluation_changes_nothing_in_the_model(
    elsewhere: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", (tokenizers := StartingTokenizers()))
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(300)))
    given: dict[str, Any] = {"calibration": str(tmp_path / "text.txt"), "device": "cpu", "calibration_tokens": 1024}
    given |= QUICK | {"method": "refit"} | ({"tokenizer": base} if elsewhere else {})
    cases: dict[str, dict[str, Any]] = {"plain": {}, "started": {"add_bos_token": True}}
    for name, more in cases.items():
        tokenizers.loaded.clear()
        lm = FusedLlamaLM(base, fused_dir=str(tmp_path / name), **given, **more)
        assert len(tokenizers.loaded) == 1 + len(more)
        assert lm.tokenizer.bos_token == ("layer" if more else "<s>")
    plain, started = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "started"))
    assert all(torch.equal(plain[name], started[name]) for name in plain)
    files = [(tmp_path / name / "tokenizer_config.json").read_bytes() for name in ("plain", "started")]
    assert files[0] == files[1]


def test_layers_are_spread_over_gpus_only_where_there_are_any(base: str, saved: str) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there are some")
    for lm in (
        FusedLlamaLM(base, parallelize=True, **QUICK),
        FusedLlamaLM(saved, parallelize=True),
        FusedLlamaLM(saved, parallelize=True, max_memory_per_gpu="1GiB", max_cpu_memory="1GiB"),
    ):
        assert {parameter.device.type for parameter in lm.model.parameters()} == {"cpu"}
        request = Instance("loglikelihood", {}, ("layer model", " weight"), 0)
        assert lm.loglikelihood([request], disable_tqdm=True)[0][0] < 0
