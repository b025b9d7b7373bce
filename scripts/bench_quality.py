#!/usr/bin/env python3
"""Compare ways of making a model shallower: one run, one table of how well each predicts text, and accuracies.

    .venv/bin/python scripts/bench_quality.py --model gemma3-270m --text wiki.txt --mmlu mmlu_dir

All ways get the same model and the same calibration text, and are judged on text that it does not contain; but mka and
neural_alignment take MMLU questions instead, and drop by loss takes some 16 sequences of the text. Healed ones are
trained on more of it, with documentation beside it; what --checkpoints are made of is theirs to say. A way that cannot
do a level has dashes there, and the reason in a comment above them.
  text  the second half of --text, a file of prose; with --calibrate text its first half is what is calibrated on
  docs  the second half of Python's documentation
  reasoning  worked questions that lm-eval ships
  quiz  MMLU questions (the original CSV release, --mmlu) as cloze: choices are scored as text by log-likelihood a
        character. `diff` is against the dense model, question by question, with its standard error.
Perplexities are ratios to the dense model's. `nats` is the divergence of predictions from the dense model's,
KL(dense || fused), a token on average, and `same` how often the most likely next token is the dense model's.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf import FusedLlamaForCausalLM, FusionConfig
from lf_hf.checkpoint.base import Base
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import Predictions, batched, final_states, predictions
from lf_hf.families import FAMILIES, CausalLM, family_of
from lf_hf.healing.heal import heal_loaded
from lf_hf.measure import Measurements, measure
from lf_hf.pipeline import fuse
from lf_hf.refit.fit import Regression, token_weights
from lf_hf.refit.groups import cheapest_sets
from lf_hf.refit.layer_parts import (
    attention_heads,
    build_layer,
    expanded,
    layer_weights,
    mid_state,
    mlp_channels,
    selected,
    stacked,
    written_by,
)
from lf_hf.refit.states import Boundaries, StateStore
from lf_hf.text.calibration import (
    BUNDLED,
    Corpus,
    documentation_halves,
    load_calibration,
    load_corpus,
    load_training_text,
)
from lf_hf.text.judging import judging_texts
from lf_hf.text.mmlu import SUBJECTS, Question, read_csv_questions
from lf_hf.text.packing import pack_tokens

ROOT = Path(__file__).parent.parent
MODELS = {"smollm2": ("fetch_smollm2", [1, 4, 10, 12, 15]), "gemma3-270m": ("fetch_gemma3", [1, 2, 4, 6])}
LENGTH = 512
_LEVERAGE_RIDGE = 1e-2  # in units of the mean diagonal


@dataclass
class Ways:
    """The methods of the package and simple forms of their rivals; each changes the model that it is given."""

    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    measured: Measurements  # on the dense model, for all ways and levels
    base: Callable[[], Base]
    heal_corpus: Corpus
    heal_tokens: int
    dropped: list[int] = field(default_factory=list)  # by greedy_drop, in order

    def fusion(self, model: CausalLM, count: int, *, healed: bool = False, **settings: str) -> CausalLM:
        """A method of the package, with a distillation from the base after it where that is asked for."""
        config, decoder = FusionConfig(count, **self.settings | settings), ModelDecoder(model)
        report = fuse(decoder, self.tokenizer, config, None, None, base="bench", measurements=self.measured)
        if groups := [[*group] for group in report.groups if len(group) > 1]:
            print(f"<!-- {groups} -->", flush=True)
        if not healed:
            return model
        fused = FusedLlamaForCausalLM.adopt(model, report, self.tokenizer)
        heal_loaded(fused, self.base(), self.heal_corpus, replace(config, heal_tokens=self.heal_tokens))
        return fused

    def greedy_drop(self, model: CausalLM, count: int) -> CausalLM:
        """Drop, one by one, the layer without which calibration text is predicted best (SLEB, arXiv:2402.09025).

        Judged on some 16 sequences of full length, spread evenly over the text.
        """
        longest = max(map(len, self.measured.text))
        full = [sequence for sequence in self.measured.text if len(sequence) == longest]
        decoder = ModelDecoder(model)
        ids = batched(decoder, {"text": full[:: max(1, len(full) // 16)]})
        for step in range(count):
            if step == len(self.dropped):
                losses = {}
                for index in range(decoder.num_layers):
                    layer = model.model.layers.pop(index)
                    losses[index] = predictions(decoder, ids, final_states(decoder, ids, "Judging"))["text"].perplexity
                    model.model.layers.insert(index, layer)
                self.dropped.append(min(losses, key=lambda index: losses[index]))
            decoder.remove(self.dropped[step])
        return model

    @torch.inference_mode()
    def linear_map(self, model: CausalLM, count: int) -> CausalLM:
        """Cut a run of layers; a map of the MLP output before it makes good (ReplaceMe, arXiv:2505.02819)."""
        decoder = ModelDecoder(model)
        if decoder.family.mlp.after:
            raise ValueError("A linear map cannot be folded into an MLP whose output goes through a norm.")
        batches = decoder.batches(self.measured.text)
        states = [decoder.embed(batches), *(list(states) for states in decoder.walk(batches))]

        def distance(start: int) -> float:  # between the states before and after the run that starts there
            return statistics.mean(
                1 - float(torch.cosine_similarity(a[:, 1:].float(), b[:, 1:].float(), dim=-1).mean())
                for a, b in zip(states[start], states[start + count], strict=True)
            )

        start = min(range(1, decoder.num_layers - count + 1), key=distance)
        layer = decoder.layer(start - 1)
        regression = Regression(model.config.hidden_size, model.config.hidden_size, model.device)
        for before, target in zip(states[start - 1], states[start + count], strict=True):
            residual = mid_state(decoder, layer, before)
            written = written_by(decoder, decoder.family.mlp, layer, residual)
            wanted = (target - residual).flatten(0, 1) / decoder.family.residual_factor(decoder.config)
            regression.add(written.flatten(0, 1), wanted, token_weights(decoder, target))
        regression.complete()
        through = regression.ridge(torch.eye(model.config.hidden_size), 1e-2)
        down = layer.mlp.down_proj.named_parameters()  # it may have a bias
        mapped = {f"mlp.down_proj.{name}": (through @ part.float()).to(part.dtype) for name, part in down}
        decoder.replace(start - 1, mapped)
        for _ in range(count):
            decoder.remove(start)
        return model

    @torch.inference_mode()
    def flattened(self, model: CausalLM, count: int) -> CausalLM:
        """Layers of like inputs side by side, with half of their heads and channels (FlattenGPT, arXiv:2602.08858).

        What is kept has the highest ridge leverage, and down_proj makes good for the rest. A layer is in one pair.
        """
        decoder = ModelDecoder(model)
        if decoder.family.attention.after or decoder.family.head_norms:
            raise ValueError("Layers whose queries, keys or outputs go through norms are not flattened here.")
        states = decoder.embed(decoder.batches(self.measured.text))
        angles = Boundaries(decoder, states, StateStore()).influences  # between the inputs of layers i and i + 1
        kinds = decoder.family.config_kinds(decoder.config)
        pairs = {(i, i + 1): angle for i, angle in enumerate(angles[:-1]) if kinds[i] == kinds[i + 1]}
        chosen = cheapest_sets(pairs, count, count=1)
        if not chosen:
            raise ValueError(f"{decoder.num_layers} layers have no {count} pairs of one kind.")
        firsts = [first - before for before, (first, _) in enumerate(chosen[0])]
        for index in range(decoder.num_layers - count):
            if index in firsts:
                decoder.replace(index, self._flat(decoder, index, states))
                decoder.remove(index + 1)
            states = [decoder.run_layer(decoder.layer(index), state) for state in states]
        return model

    def _flat(self, decoder: ModelDecoder, index: int, states: Sequence[Tensor]) -> dict[str, Tensor]:
        """Layers `index` and the next one as one, for states before the first."""
        layers = list(decoder.layers((index, index + 1)))
        kind, pair = decoder.family.layer_kind(layers[0]), [layer_weights(decoder, layer) for layer in layers]
        attention = dict(pair[0]) | stacked(decoder.family.attention, pair)
        wide, keys = build_layer(decoder, attention, kind), len(pair[0]["self_attn.k_proj.weight"])
        head_dim, queries = wide.self_attn.head_dim, len(pair[0]["self_attn.q_proj.weight"])
        heads = [attention_heads(decoder, wide, state) for state in states]
        kept = _highest_leverage(heads, keys // head_dim, queries // (keys // head_dim))
        of_queries, of_keys = expanded(kept, queries * head_dim // keys), expanded(kept, head_dim)
        attention = selected(decoder.family.attention, attention, of_queries, of_keys, of_keys)
        narrow = build_layer(decoder, attention, kind)
        residuals = [mid_state(decoder, narrow, state) for state in states]

        mlp = stacked(decoder.family.mlp, pair)
        channels = [mlp_channels(decoder, mlp, residual) for residual in residuals]
        kept = _highest_leverage(channels, decoder.config.intermediate_size, 1)
        down = mlp["mlp.down_proj.weight"]
        regression = Regression(len(kept), len(down), down.device, down.dtype)
        for of_state in channels:
            regression.add(of_state[:, kept], of_state @ down.T, torch.ones(len(of_state)))
        regression.complete()
        mlp = selected(decoder.family.mlp, mlp, kept, kept)
        mlp["mlp.down_proj.weight"] = regression.ridge(down[:, kept], _LEVERAGE_RIDGE).to(down)
        return {name: weight for name, weight in attention.items() if "mlp" not in name} | mlp


Way = Callable[[Ways, CausalLM, int], CausalLM]
WAYS: dict[str, Way] = {
    "truncate": partial(Ways.fusion, method="truncate"),
    "mka": partial(Ways.fusion, method="mka"),
    "neural_alignment": Ways.fusion,
    "mka, least_influence": partial(Ways.fusion, method="mka", selection="least_influence"),
    "neural_alignment, least_influence": partial(Ways.fusion, selection="least_influence"),
    "drop by influence": partial(Ways.fusion, method="truncate", selection="least_influence"),
    "drop by loss": Ways.greedy_drop,
    "cut and linear map": Ways.linear_map,
    "FlattenGPT": Ways.flattened,
    "neurons, average, refit": partial(
        Ways.fusion, selection="least_influence", alignment="neurons", merge="average", refit="down_proj"
    ),
    "refit by influence": partial(Ways.fusion, method="refit", selection="least_influence"),
    "refit": partial(Ways.fusion, method="refit"),
    "drop by influence, healed": partial(Ways.fusion, method="truncate", selection="least_influence", healed=True),
    "refit, healed": partial(Ways.fusion, method="refit", healed=True),
}


def _highest_leverage(inputs: Sequence[Tensor], keep: int, block: int) -> Tensor:
    """Numbers of the blocks of inputs, each (tokens, m), that have the highest ridge leverage scores together."""
    regression = Regression(inputs[0].shape[1], 1, inputs[0].device)
    for part in inputs:
        regression.add(part, part[:, :1], torch.ones(len(part)))
    regression.complete()
    gram = regression.gram.double()
    pulled = gram + _LEVERAGE_RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    scores = torch.linalg.solve(pulled, gram).diagonal().unflatten(0, (-1, block)).sum(1)
    return scores.topk(keep).indices.sort().values


class Judge:
    """How a model predicts texts, compared with the model that is judged first, and its cloze accuracy."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], tokens: int, questions: Sequence[Question]
    ) -> None:
        self.texts = {name: pack_tokens(tokenizer, text, LENGTH, tokens) for name, text in texts.items()}
        self.base: ModelDecoder | None = None
        self.dense: dict[str, list[Tensor]] = {}
        self.questions = [self._packed(tokenizer, question) for question in questions]

    def predictions(self, model: CausalLM) -> dict[str, Predictions]:
        decoder = ModelDecoder(model)
        ids = batched(decoder, self.texts)
        states = final_states(decoder, ids, "Judging")
        if self.base is None:
            self.base, self.dense = decoder, states
        return predictions(decoder, ids, states, self.dense, self.base)

    @torch.inference_mode()
    def correct(self, model: CausalLM) -> list[bool]:
        """For each question whether the right choice is the likeliest a character."""
        right = []
        for ids, positions, mask, spans, answer in self.questions:
            additive = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
            states = model.model(
                input_ids=ids, position_ids=positions, attention_mask=additive, use_cache=False
            ).last_hidden_state[0]
            scores = []
            for rows, targets, characters in spans:
                logits = family_of(model.config).logits(model.config, model.lm_head(states[rows]))
                log_probabilities = logits.float().log_softmax(-1)
                scores.append(float(log_probabilities.gather(1, targets[:, None]).sum()) / characters)
            right.append(scores.index(max(scores)) == answer)
        return right

    @staticmethod
    def _packed(
        tokenizer: PreTrainedTokenizerBase, question: Question
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, int]], int]:
        """One sequence with the question and, side by side after it, all choices, none of which sees another."""
        prompt = tokenizer(f"Question: {question.question.strip()}\nAnswer:")["input_ids"]
        choices = [
            tokenizer(f" {choice.strip()}", add_special_tokens=False)["input_ids"] for choice in question.choices
        ]
        ids, positions = list(prompt), list(range(len(prompt)))
        spans, blocks = [], []
        for choice, text in zip(choices, question.choices, strict=True):
            rows = [len(prompt) - 1, *range(len(ids), len(ids) + len(choice) - 1)]
            spans.append((torch.tensor(rows), torch.tensor(choice), max(1, len(text.strip()))))
            blocks.append(range(len(ids), len(ids) + len(choice) - 1))
            ids += choice[:-1]
            positions += range(len(prompt), len(prompt) + len(choice) - 1)
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        for block in blocks:
            mask[block.start : block.stop, len(prompt) : block.start] = False
        return torch.tensor([ids]), torch.tensor([positions]), mask[None, None], spans, question.answer


# What tiny models have of their own: a Llama unlike the base, a Gemma whose window is shorter than its text.
TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "tie_word_embeddings": False,
    },
    "gemma2": {"sliding_window": 64, "head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 64, "sliding_window_pattern": 6, "head_dim": 32, "query_pre_attn_scalar": 32},
    "qwen3": {"head_dim": 32},
}


def tiny_model(model_type: str, tokenizer: PreTrainedTokenizerBase, text: str, minutes: float) -> CausalLM:
    """A small model of a family, trained on text."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    family = FAMILIES[model_type]
    model = family.causal_lm(family.config_class(**settings | TINY.get(model_type, {})))
    sequences = torch.stack([s for s in pack_tokens(tokenizer, text, 128, 10**9) if len(s) == 128])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    end, losses = time.monotonic() + 60 * minutes, [0.0]
    while time.monotonic() < end:
        batch = sequences[torch.randint(len(sequences), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"Trained a model of {model.num_parameters():,} parameters: {len(losses)} steps, last loss {losses[-1]:.2f}.")
    return model.eval()


def smallest_window(model: CausalLM) -> int | None:
    """How many tokens, with its own, a token attends to at most in some layer."""
    family = family_of(model.config)
    windows = (family.layer_window(model.config, layer) for layer in model.model.layers)
    return min((window for window in windows if window is not None), default=None)


def row(
    name: str, count: int, dense: dict[str, Predictions], fused: dict[str, Predictions], quiz: str, seconds: float
) -> None:
    figures = [f"{predicted.perplexity / dense[text].perplexity:.4g}" for text, predicted in fused.items()]
    figures += [f"{predicted.divergence:.4f}" for predicted in fused.values()]
    figures += [f"{predicted.agreement:.1%}" for predicted in fused.values()]
    print(f"| {name} | {count} | {' | '.join(figures)} | {quiz} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=MODELS, help="what scripts/environment fetches, once")
    parser.add_argument("--base", help="folder or hub name, in place of --model")
    parser.add_argument("--gguf-file", help="default: the first *.gguf in --base")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--text", type=Path, help="a file of prose")
    parser.add_argument("--mmlu", type=Path, help="folder of the MMLU CSV release")
    parser.add_argument("--calibrate", default="default", choices=["default", "text"])
    parser.add_argument("--tokens", type=int, default=49152, help="calibration tokens")
    parser.add_argument("--judge-tokens", type=int, default=8192, help="tokens of each judging text")
    parser.add_argument("--fusions", type=int, nargs="*", help="default: some that suit --model")
    parser.add_argument("--quiz-fusions", type=int, nargs="*", default=[4, 10])
    parser.add_argument("--questions", type=int, default=1500, help="of the quiz, at most")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="only these rows")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="DIR", help="made of the base by any program")
    parser.add_argument("--heal-tokens", type=int, default=131072, help="tokens that healed rows are trained on")
    parser.add_argument("--tiny", type=float, metavar="MINUTES", help="train a tiny model on --text, and use that")
    parser.add_argument("--family", default="llama", choices=FAMILIES, help="of the tiny model")
    options = parser.parse_args()
    if options.questions < 2:
        parser.error("--questions must be 2 or more.")
    fetch, fusions = MODELS[options.model]
    options.fusions = fusions if options.fusions is None else options.fusions
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    if options.base is None:
        options.base = str(ROOT / ".cache" / options.model)
        subprocess.run(["bash", "-c", f". scripts/environment && {fetch}"], cwd=ROOT, check=True)
    gguf = options.gguf_file or min((file.name for file in Path(options.base).glob("*.gguf")), default=None)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(options.base, gguf_file=gguf)
    halves: tuple[str, str] | None = None
    if options.text:
        text = options.text.read_text(encoding="utf-8")
        middle = len(text) // 2
        middle = max(middle, text.find("\n", middle))
        halves = text[:middle], text[middle:]
    if (options.calibrate == "text" or options.tiny) and halves is None:
        parser.error("--calibrate text and --tiny need --text FILE.")
    if options.tiny and halves:
        training_text = halves[0] + documentation_halves()[0]
        tokenizer = make_tokenizer(2048, training_text)  # so few that a model learns in minutes
        base = tiny_model(options.family, tokenizer, training_text, options.tiny).to(getattr(torch, options.dtype))
    else:  # in its type from the beginning, as angles of positions stay in float32 then
        base = AutoModelForCausalLM.from_pretrained(options.base, gguf_file=gguf, dtype=options.dtype).eval()

    questions = []
    if options.mmlu and (options.checkpoints or set(options.quiz_fusions) & set(options.fusions)):
        questions = [q for subject in SUBJECTS for q in read_csv_questions(options.mmlu, "test", subject)]
        questions = [q for q in questions if len(q.question) < 200 and max(map(len, q.choices)) < 80]
        questions = random.Random(0).sample(questions, min(options.questions, len(questions)))
    judge = Judge(
        tokenizer,
        ({"text": halves[1]} if halves else {}) | {judging.name: judging.text for judging in judging_texts()},
        options.judge_tokens,
        questions,
    )
    window, reach = smallest_window(base), max((int(question[1].max()) for question in judge.questions), default=0)
    if window is not None and reach >= window:
        parser.error(f"Leave out --mmlu: the model's window of {window} tokens is shorter than a question.")

    given = [halves[0]] if options.calibrate == "text" and halves else BUNDLED
    scratch = tempfile.TemporaryDirectory()
    if options.tiny:
        base.save_pretrained(scratch.name)
        tokenizer.save_pretrained(scratch.name)
    opened = partial(
        Base.open, scratch.name if options.tiny else options.base, {} if options.tiny else {"gguf_file": gguf}
    )
    if options.fusions:
        corpus = load_corpus(given, max_tokens=options.tokens)
        settings = {"perplexity_tokens": 0, "calibration_tokens": options.tokens}
        measured = measure(
            ModelDecoder(base), tokenizer, FusionConfig(1, **settings), load_calibration(BUNDLED), corpus
        )
        heal_corpus = load_training_text(given, options.heal_tokens)
        ways = Ways(tokenizer, settings, measured, opened, heal_corpus, options.heal_tokens)
        print(f"Calibrated on {sum(map(len, measured.text))} tokens: {corpus.full_source}.")

    dense = judge.predictions(base)
    dense_correct = judge.correct(base)
    accuracy = f", quiz {statistics.mean(dense_correct):.3f}" if questions else ""
    print(f"Dense: {', '.join(f'{name} {found.perplexity:.4g}' for name, found in dense.items())}{accuracy}.\n")
    heads = [*dense, *(f"{text}, {figure}" for figure in ("nats", "same") for text in dense)]
    print(f"| way | fused | {' | '.join(heads)} | quiz (diff) | seconds |")
    print("|---" * (4 + len(heads)) + "|")

    def judged(name: str, count: int, model: CausalLM, seconds: float) -> None:
        quiz = ""
        if questions and (count in options.quiz_fusions or name in options.checkpoints):
            correct = judge.correct(model)
            changes = [float(a) - float(b) for a, b in zip(correct, dense_correct, strict=True)]
            error = statistics.stdev(changes) / len(changes) ** 0.5
            quiz = f"{statistics.mean(correct):.3f} ({statistics.mean(changes):+.3f} +- {error:.3f})"
        row(name, count, dense, judge.predictions(model), quiz, seconds)

    for count in options.fusions:
        for name, way in WAYS.items():
            if name not in options.ways:
                continue
            start = time.monotonic()
            try:
                if count >= base.config.num_hidden_layers:
                    raise ValueError(f"The model has only {base.config.num_hidden_layers} layers.")
                model = way(ways, copy.deepcopy(base), count)
            except ValueError as error:
                print(f"<!-- {error} -->\n| {name} | {count} {'| - ' * (2 + len(heads))}|", flush=True)
                continue
            judged(name, count, model, time.monotonic() - start)
    for folder in options.checkpoints:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype).eval()
        judged(folder, base.config.num_hidden_layers - model.config.num_hidden_layers, model, 0.0)


if __name__ == "__main__":
    main()
