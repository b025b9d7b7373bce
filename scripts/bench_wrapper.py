#!/usr/bin/env python3
"""Whether a vision-language model still answers questions about pictures after layers of its decoder were fused.

    .venv/bin/python scripts/bench_wrapper.py --text wiki.txt --minutes 5 --fusions 2 4 6

A small Mistral 3 is trained from nothing, for some minutes, on the first half of --text and on questions about pictures
of handwritten digits, which come with scikit-learn. Fusing sees text alone: that half and, in other rows, the same
questions without pictures beside it. Checkpoints are opened by transformers, and judged on pictures and on a half of
the text that nothing was trained on: an answer is right if its word is the most likely one. It takes 25 CPU minutes.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from bench_quality import FUSIONS, read_halves
from random_checkpoint import make_tokenizer
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf import fuse_checkpoint
from lf_hf.text.packing import pack_tokens

IMAGE, SIDE, TOKENS = "<image>", 8, 4  # the token of pictures, their pixels a side, and how many tokens each takes
HELD_OUT = 597  # pictures that no model is trained on
LENGTH = 128  # tokens of a sequence of prose
TOWER_STEPS, RATE = 600, 2e-3  # of the training
WAYS = ("drop by influence", "drop by influence, healed", "refit", "refit, healed")
_TEENS = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
WORDS = f"zero one two three four five six seven eight nine ten {_TEENS}".split()


Kind: TypeAlias = tuple[int, Callable[[int, int], str]]
"""A number of pictures, and a question and its answer about a digit a on one, and b on another or in the question."""
KINDS: dict[str, Kind] = {
    "digit": (1, lambda a, b: f"Which digit is this? {WORDS[a]}"),
    "even": (1, lambda a, b: f"Is this digit even? {'no' if a % 2 else 'yes'}"),
    "plus": (1, lambda a, b: f"What is this digit plus {WORDS[b]}? {WORDS[a + b]}"),
    "sum": (2, lambda a, b: f"What is the sum of both digits? {WORDS[a + b]}"),
}


@dataclass(frozen=True)
class Pictures:
    """Pictures (number, 3, SIDE, SIDE) with values from -1 to 1, and the digits on them.

    Their channels are strokes, rows and columns: where a pixel is, a tower so small would take long to find out.
    """

    pixels: Tensor
    digits: list[int]

    def ask(self, tokenizer: PreTrainedTokenizerBase, kind: Kind, pairs: Tensor) -> dict[str, Tensor]:
        """A model's inputs: a question about each pair of pictures, by their numbers, and its answer, one token."""
        num_pictures, text = kind
        shown = f"{IMAGE * TOKENS}\n" * num_pictures
        texts = [shown + text(self.digits[a], self.digits[b]) for a, b in pairs.tolist()]
        pixels = self.pixels[pairs[:, :num_pictures].flatten()]
        ids = torch.tensor(tokenizer(texts)["input_ids"])  # of one length
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.full((len(pixels), 2), SIDE)}


def load_pictures() -> tuple[Pictures, Pictures]:
    """Pictures to train on, and held-out ones."""
    data = load_digits()
    strokes = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    places = torch.linspace(-1, 1, SIDE).expand(SIDE, SIDE)
    pixels = torch.stack([strokes, places.T.expand_as(strokes), places.expand_as(strokes)], 1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    parts = [Pictures(pixels[part], data.target[part].tolist()) for part in order.split(len(order) - HELD_OUT)]
    return parts[0], parts[1]


def questions_alone() -> str:
    """All questions with their answers, without pictures."""
    return "\n".join(text(a, b) for a in range(10) for b in range(10) for _, text in KINDS.values())


def untrained(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A small Mistral 3 with random weights."""
    text: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 9, "head_dim": 32}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": 512, "initializer_range": 0.06}  # more than usual, as it is narrow
    text |= dict.fromkeys(("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"))
    sees: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sees |= {"head_dim": 32, "image_size": SIDE, "patch_size": SIDE // 2, "initializer_range": 0.1}
    config = AutoConfig.for_model(
        "mistral3",
        text_config={"model_type": "mistral", **text},
        vision_config={"model_type": "pixtral", **sees},
        spatial_merge_size=1,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    return AutoModelForImageTextToText.from_config(config)


def moved(pixels: Tensor) -> Tensor:
    """Pictures shifted by up to a pixel, with some noise."""
    strokes = pixels[:, :1].roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3))
    return torch.cat([strokes + 0.1 * torch.randn_like(strokes), pixels[:, 1:]], 1)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step of a training."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def train_tower(model: Any, pictures: Pictures) -> None:
    """Train the vision tower to tell digits apart, as towers are trained before they see text."""
    to_digits = torch.nn.Linear(model.config.text_config.hidden_size, 10)
    parts = model.model.vision_tower, model.model.multi_modal_projector, to_digits
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=2e-3)
    sizes = torch.full((64, 2), SIDE)
    for _ in range(TOWER_STEPS):
        numbers = torch.randint(len(pictures.digits), (64,))
        tokens = model.model.get_image_features(moved(pictures.pixels[numbers]), sizes).pooler_output
        digits = torch.tensor(pictures.digits)[numbers]
        step(optimizer, torch.nn.functional.cross_entropy(to_digits(torch.stack(tokens).mean(1)), digits))


def train(folder: Path, text: str, pictures: Pictures, minutes: float) -> None:
    """Train a model for some minutes of CPU time, and save it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(2048, text + f"{questions_alone()} {' '.join(WORDS)}" * 20)  # so that words are tokens
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    model = untrained(tokenizer)
    begun, kinds, steps, spent = time.process_time(), [*KINDS.values()], 0, 0.0
    train_tower(model, pictures)
    prose = torch.stack([s for s in pack_tokens(tokenizer, text, LENGTH, 10**9) if len(s) == LENGTH])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    while spent < 1:
        optimizer.param_groups[0]["lr"] = RATE * min(1, (steps + 1) / 100, 2 * (1.01 - spent))
        read = prose[torch.randint(len(prose), (2,))]
        pairs = torch.randint(len(pictures.digits), (32, 2))
        batch = pictures.ask(tokenizer, kinds[steps % len(kinds)], pairs)
        batch["pixel_values"] = moved(batch["pixel_values"])
        answers = batch["input_ids"].clone()
        answers[:, :-1] = -100
        step(optimizer, model(input_ids=read, labels=read).loss + model(**batch, labels=answers).loss)
        steps += 1
        spent = (time.process_time() - begun) / (60 * minutes)
    print(f"Trained a model of {model.num_parameters():,} parameters: {steps} steps.", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def judge(model: Any, tokenizer: PreTrainedTokenizerBase, pictures: Pictures, text: str) -> list[str]:
    """Cells of a model's row: perplexity on a text, and accuracies with their standard errors."""
    losses = [model(input_ids=s[None], labels=s[None]).loss for s in pack_tokens(tokenizer, text, LENGTH, 16384)]
    cells = [f"{torch.stack(losses).mean().exp():.2f}"]
    numbers = torch.arange(HELD_OUT)
    for kind in KINDS.values():
        right = 0
        for pairs in torch.stack([numbers, numbers.roll(1)], 1).split(100):
            batch = pictures.ask(tokenizer, kind, pairs)
            said = model(**batch, logits_to_keep=2).logits[:, 0].argmax(-1)
            right += int((said == batch["input_ids"][:, -1]).sum())
        share = right / HELD_OUT
        cells.append(f"{share:.3f} +- {(share * (1 - share) / HELD_OUT) ** 0.5:.3f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a file of prose")
    parser.add_argument("--base", type=Path, help="folder of a model that this has trained, or is to train")
    parser.add_argument("--minutes", type=float, default=5, help="of the training, on one CPU thread")
    parser.add_argument("--fusions", type=int, nargs="*", default=[2, 4, 6])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="only these rows")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    first_half, second_half = read_halves(options.text)
    pictures, held_out = load_pictures()
    texts = {"prose": [first_half], "prose and questions": [first_half, *[questions_alone()] * 10]}
    with tempfile.TemporaryDirectory() as scratch:
        base = options.base or Path(scratch, "base")
        if not base.exists():
            train(base, first_half, pictures, options.minutes)
        tokenizer = AutoTokenizer.from_pretrained(base)

        def show(folder: Path, *cells: str) -> None:
            model = AutoModelForImageTextToText.from_pretrained(folder).eval()
            print(f"| {' | '.join([*cells, *judge(model, tokenizer, held_out, second_half)])} |", flush=True)

        print(f"\n| way | fused | calibration text | CPU seconds | perplexity | {' | '.join(KINDS)} |")
        print("|---" * (5 + len(KINDS)) + "|")
        show(base, "dense", "", "", "")
        for (name, calibration), count, way in itertools.product(texts.items(), options.fusions, options.ways):
            out, begun = Path(scratch, f"{name} {count} {way}"), time.process_time()
            settings = FUSIONS[way] | {"calibration_tokens": 49152, "perplexity_tokens": 0, "speed": False}
            if way.endswith("healed"):
                settings["heal_tokens"] = 65536
            report = fuse_checkpoint(base, out, num_fusions=count, calibration=calibration, **settings)
            print(f"<!-- {[layer.layers for layer in report.fused_layers]} -->")
            show(out, way, str(count), name, f"{time.process_time() - begun:.0f}")


if __name__ == "__main__":
    main()
