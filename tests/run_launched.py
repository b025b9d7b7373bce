"""Fuse a tiny model in all processes of a launch together, and in the first one alone; print how they compare."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import make_llama, make_texts, make_tokenizer

from lf_hf import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.pipeline import fuse
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.text.calibration import Calibration, Corpus, load_calibration

TEMPLATE = (  # so that processes share chats to write, too
    "{% for m in messages %}{{ '<s>' + m.role + ' ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "refit": {"method": "refit", "num_fusions": 3},
    "by groups": {"method": "refit", "selection": "groups", "num_fusions": 2, "calibration_tokens": 8192},
    "within a budget": {"method": "truncate", "selection": "groups", "max_divergence": 10.0},
    "neural_alignment, refitted": {"method": "neural_alignment", "refit": "down_proj", "num_fusions": 2},
}


def fused(processes: Processes, settings: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What comes out, as numbers."""
    llama = make_llama(num_hidden_layers=6).double()
    decoder: Decoder
    if folder is None:
        decoder = ModelDecoder(llama, keep_originals=True, processes=processes)
    else:
        shared = processes.broadcast_object(lambda: llama.save_pretrained(folder / "base") or folder)
        decoder = CheckpointDecoder(shared / "base", copy.deepcopy(llama.config), folder, dtype=torch.float64)
        decoder.processes = processes
    config = FusionConfig(**{"calibration_tokens": 2048, "calibration_length": 64, "perplexity_tokens": 300} | settings)
    texts = make_texts(config.calibration_tokens // 40)
    samples, text = Calibration(texts[:60], "samples"), Corpus(texts, "texts", generated_share=0.25)
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


def main() -> None:
    torch.set_num_threads(1)
    processes = Processes.of_launch()
    if processes.rank == 1:
        load_calibration()  # which a process may do alone
    for name in sys.argv[1:]:
        alone = None
        settings = SETTINGS["refit" if name == "dies" else name]
        for on_disk in (False, True) if name == "refit" else (False,):
            with tempfile.TemporaryDirectory() as folder:
                together = fused(processes, settings, Path(folder) if on_disk else None)
                digests = processes.all_gather_object(together["digest"])
            if not processes.is_main:
                continue
            alone = alone or fused(ALONE, settings, None)
            differences = [
                float((together["weights"][key] - weight).detach().abs().max())
                for key, weight in alone["weights"].items()
            ]
            result = {
                "name": name,
                "processes": processes.world_size,
                "digests": len(set(digests)),
                "same choices": all(together[key] == alone[key] for key in ("pairs", "fitted", "written")),
                "weights": max(differences),
                "perplexities": max(
                    abs(a / b - 1) for a, b in zip(together["perplexities"], alone["perplexities"], strict=True)
                ),
            }
            print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "dies" and Processes.of_launch().rank == 1:
        raise SystemExit(3)  # while the others sum
    main()
