"""What the processes of a launch do together, and one of them alone; run by test_launches.py.

`run_launched.py FOLDER [ARGUMENTS]`: all of it, or a healing alone, with training arguments in JSON.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_llama, make_texts, make_tokenizer, tensors
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig, HealSettings
from lf_hf.cli import main as command
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.healing import trainer
from lf_hf.healing.loss import FullTargets, Loss
from lf_hf.pipeline import fuse
from lf_hf.runtime.launch import ALONE, OtherProcessError, Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.text.calibration import CalibrationSamples, Corpus

TEMPLATE = (  # so that processes share chats to write, too
    "{% for m in messages %}{{ '<s>' + m.role + ' ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "refit": {"method": "refit", "num_fusions": 2},
    "refit, on disk": {"method": "refit", "num_fusions": 2},
    "by groups": {"method": "refit", "selection": "groups", "num_fusions": 2},
    "within a budget": {"method": "truncate", "selection": "groups", "max_divergence": 10.0},
    "neural_alignment, refitted": {"method": "neural_alignment", "refit": "down_proj", "num_fusions": 2},
}
HEALING: dict[str, Any] = {"tokens": 2048, "length": 32, "batch_tokens": 128, "learning_rate": 3e-3}


def fused(processes: Processes, settings: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What comes out, as numbers."""
    llama = make_llama().double()
    decoder: Decoder
    if folder is None:
        decoder = ModelDecoder(llama, keep_originals=True, processes=processes)
    else:
        shared = processes.broadcast_object(lambda: llama.save_pretrained(folder / "base") or folder)
        decoder = CheckpointDecoder(shared / "base", copy.deepcopy(llama.config), folder, dtype=torch.float64)
        decoder.processes = processes
    # Of 31 sequences, so that shares are not even.
    config = FusionConfig(**{"calibration_tokens": 1984, "calibration_length": 64, "perplexity_tokens": 300} | settings)
    texts = make_texts(config.calibration_tokens // 40)
    samples, text = CalibrationSamples(make_texts(60), "samples"), Corpus(texts, "texts", generated_share=0.25)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    report = fuse(decoder, tokenizer, config, samples, text, base="base")
    assert len(report.continuations) == 4
    assert not config.needs_text or "sequences of it as chats" in report.calibration[-1].source
    return {
        "pairs": [(step.pair, step.heads_kept, step.channels_kept) for step in report.steps],
        "fitted": [(layer.layers, layer.heads_kept, layer.channels_kept) for layer in report.fitted_layers],
        "weights": {name: weight.double() for name, weight in decoder.named_parameters()},
        "written": report.continuations,
        "perplexities": [
            figure for judged in report.perplexities for figure in (judged.fused, judged.divergence, judged.agreement)
        ],
        "digest": weights_digest(decoder.named_parameters()),
    }


def compared(processes: Processes, name: str, alone: dict[str, Any]) -> dict[str, Any]:
    """How a fusion of all processes differs from that of one, which is kept for the next."""
    with tempfile.TemporaryDirectory() as folder:
        together = fused(processes, SETTINGS[name], Path(folder) if "disk" in name else None)
        digests = processes.all_gather_object(together["digest"])
    if not processes.is_main:
        return {}
    if "disk" not in name:
        alone.update(fused(ALONE, SETTINGS[name], None))
    return {
        "processes": processes.world_size,
        "digests": len(set(digests)),
        "same choices": all(together[key] == alone[key] for key in ("pairs", "fitted", "written")),
        "weights": max(
            float((together["weights"][key] - weight).detach().abs().max()) for key, weight in alone["weights"].items()
        ),
        "perplexities": max(
            abs(a / b - 1) for a, b in zip(together["perplexities"], alone["perplexities"], strict=True)
        ),
    }


def student_figures(*, sharded: bool) -> list[float]:
    """The loss of a student, and the norm of each of its gradients."""
    model = make_llama()
    student: Any = trainer.make_student(model, HealSettings(train="all"), [])
    if sharded:
        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(student)
    ids = torch.arange(2, 66).view(2, 32)
    states = torch.randn(2, 32, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    loss = student(ids, targets=FullTargets(states, model.lm_head.weight.detach()), loss=Loss(2.0, 0.2))["loss"]
    loss.backward()
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in student.parameters()]
    return [loss.item(), *(gradient.norm().item() for gradient in gradients)]


def saves(folder: Path) -> dict[str, float]:
    """Save a model that the processes hold between them, by each way of splitting it: how far what loads is off."""
    ids = torch.arange(40).reshape(2, 20)
    whole, spread = (FusedLlamaForCausalLM.from_pretrained(folder / "whole") for _ in range(2))
    for layer in spread.model.layers:
        fully_shard(layer)
    models, errors = {"fsdp2": fully_shard(spread)}, {}
    if "tp_size" in inspect.signature(DistributedConfig).parameters:  # not in older transformers
        split = {"distributed_config": DistributedConfig(tp_size=2)}
        models["tp"] = FusedLlamaForCausalLM.from_pretrained(folder / "whole", **split)
    (folder / "file").touch()
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="50KB")
        model.save_pretrained(folder / f"{name} given", state_dict=model.state_dict())
        for out in (name, f"{name} given"):
            loaded = FusedLlamaForCausalLM.from_pretrained(folder / out)
            assert tensors(folder / out).keys() == tensors(folder / "whole").keys()
            with torch.no_grad():
                errors[out] = float((loaded(ids).logits - whole(ids).logits).abs().max())
        with pytest.raises((OSError, OtherProcessError), match="Not a directory"):  # on either rank
            model.save_pretrained(folder / "file" / "out")
    whole.save_pretrained(folder / f"plain {torch.distributed.get_rank()}")  # each has it whole, so one alone saves
    return errors


def heal(folder: Path, given: dict[str, Any]) -> str:
    """The kind of launch that the Trainer saw."""
    texts = make_texts(1200, seed=5)
    arguments = {"text": texts, "training_args": {"bf16": False, **given}, **HEALING}
    lf_hf.heal(folder / "fused", folder / "healed", base=folder / "base", **arguments)
    return str(AcceleratorState().distributed_type.value)


def main(folder: Path, given: str = "") -> None:
    torch.set_num_threads(1)
    words = "--method refit --num-fusions 2 --low-memory --calibration-tokens 1984 --calibration-length 64".split()
    words = ["fuse", str(folder / "base"), str(folder / "out"), *words, "--calibration", str(folder / "texts.txt")]
    refused = 0 if given else command([*words, "--ridge", "0"])  # before the processes are connected
    processes = Processes.of_launch()

    def say(name: str, value: Any) -> None:
        if processes.is_main:
            print("RESULT " + json.dumps([name, value]), flush=True)

    if given:
        say("healed", heal(folder, json.loads(given)))
        return
    say("codes", processes.all_gather_object([command(words), refused]))
    say("healed", heal(folder, {"fsdp": True}))
    say("saves", saves(folder / "saves"))
    say("figures", [student_figures(sharded=sharded) for sharded in (True, False)])
    alone: dict[str, Any] = {}
    for name in SETTINGS:
        say(name, compared(processes, name, alone))
    if processes.rank == 1:
        raise SystemExit(3)  # while the other one sums
    fused(processes, SETTINGS["refit"], None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
