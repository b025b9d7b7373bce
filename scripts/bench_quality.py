#!/usr/bin/env python3
"""Compare ways of making a model shallower: one run, one table of how well each predicts text, and accuracies.

    .venv/bin/python scripts/bench_quality.py --model gemma3-270m --text wiki.txt --mmlu mmlu_dir

All ways get the same model and the same calibration text, and are judged on text that it does not contain; but mka and
neural_alignment take MMLU questions instead, and drop by loss takes some 16 sequences of the text. Healed ones are
trained on more of it, with documentation beside it; what --checkpoints are made of is theirs to say. A way that cannot
do a level has dashes there, and the reason in a comment above them; so have the groups that were chosen.
  text  the second half of --text, a file of prose; with --calibrate text its first half is what is calibrated on
  docs  the second half of Python's documentation
  reasoning  worked questions that lm-eval ships
  quiz  MMLU questions (the original CSV release, --mmlu) as cloze: choices are scored as text by log-likelihood a
        character. `diff` is against the dense model, question by question, with its standard error.
Perplexities are ratios to the dense model's; docs/command_line.md says what the other figures are.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf import FusionConfig, HealSettings
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.saving import FUSED, write_whole
from lf_hf.decoder.decoder import Decoder
from lf_hf.families.models import MODEL_TYPES, CausalLM, family_of
from lf_hf.families.table import FAMILIES
from lf_hf.measure.dense import CalibrationText, Measurements, measure
from lf_hf.measure.judge import judge, predict_texts
from lf_hf.measure.predictions import final_states, predictions
from lf_hf.pipeline.fusion import for_model
from lf_hf.pipeline.healing import HealInputs
from lf_hf.pipeline.run import fuse, heal_fused
from lf_hf.refit.half_fit import token_weights
from lf_hf.refit.layer_parts import mid_state, written_by
from lf_hf.refit.regression import Regression
from lf_hf.report.figures import FIGURES
from lf_hf.runtime.tasks import SUBJECTS
from lf_hf.settings import TextSource
from lf_hf.text.calibration import (
    Corpus,
    documentation_halves,
    load_calibration,
    load_corpus,
)
from lf_hf.text.judging import judging_texts
from lf_hf.text.mmlu import Question, read_csv_questions
from lf_hf.text.packing import pack_tokens

ROOT = Path(__file__).parent.parent
MODELS = {"smollm2": ("fetch_smollm2", [1, 4, 10, 12, 15]), "gemma3-270m": ("fetch_gemma3", [1, 2, 4, 6])}
LENGTH = 512
_DROP_SEQUENCES = 16  # that "drop by loss" judges on, about
_MAP_RIDGE = 1e-2  # of the linear map, in units of the mean diagonal


@dataclass
class Fuser:
    """Fuses copies of a base by the package's methods, with what was measured on it once."""

    base: Base
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    measured: Measurements
    training_text: Corpus
    heal_tokens: int

    def fuse(self, model: CausalLM, count: int, **settings: Any) -> CausalLM:
        """Fuse in place, and heal where the settings ask for that."""
        config = for_model(FusionConfig(count, **self.settings | settings), model.config)
        is_healed = config.method == "healed" or "heal_tokens" in settings
        report = fuse(Decoder(model), self.tokenizer, config, self.measured, base=self.base.name)
        print(f"<!-- {[layer.layers for layer in report.fused_layers]} -->", flush=True)
        if not is_healed:
            return model
        fused = fused_class(model.config).adopt(model, report, self.tokenizer)
        return heal(fused, self.base, self.tokenizer, self.training_text, self.heal_tokens)


def heal(
    fused: FusedForCausalLM, base: Base, tokenizer: PreTrainedTokenizerBase, text: Corpus, tokens: int
) -> FusedForCausalLM:
    """The healed model of a fused one, as of a fusion with `heal_tokens`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        saved = write_whole(folder, FUSED, partial(fused.save_pretrained, plain=True))
        return heal_fused(HealInputs.of(saved, base, tokenizer, text, HealSettings(tokens=tokens)), folder)


@dataclass
class Rivals:
    """Simple forms of other methods; each changes the model that it is given."""

    text: CalibrationText
    dropped: list[int] = field(default_factory=list)  # by `drop_by_loss`, in order

    def drop_by_loss(self, model: CausalLM, count: int) -> CausalLM:
        """Drop, one by one, the layer without which calibration text is predicted best (SLEB, arXiv:2402.09025).

        It is judged on some sequences of full length, spread evenly over the text.
        """
        decoder = Decoder(model)
        longest = max(map(len, self.text.sequences))
        full = [sequence for sequence in self.text.sequences if len(sequence) == longest]
        stride = max(1, len(full) // _DROP_SEQUENCES)
        ids = {"text": decoder.make_batches(full[::stride])}
        for step in range(count):
            if step == len(self.dropped):
                self.dropped.append(self._least_missed(decoder, ids))
            decoder.remove(self.dropped[step])
        return model

    @staticmethod
    def _least_missed(decoder: Decoder, ids: dict[str, list[Tensor]]) -> int:
        layers = decoder.model.model.layers
        perplexities = []
        for index in range(decoder.num_layers):
            layer = layers.pop(index)
            states = final_states(decoder, ids, "Judging")
            perplexities.append(predictions(decoder, ids, states)["text"]["perplexity"])
            layers.insert(index, layer)
        return perplexities.index(min(perplexities))

    @torch.inference_mode()
    def cut_and_map(self, model: CausalLM, count: int) -> CausalLM:
        """Cut a run of layers; a map of the MLP output before it makes good (ReplaceMe, arXiv:2505.02819)."""
        decoder = Decoder(model)
        if decoder.family.mlp.after:
            raise ValueError("A linear map cannot be folded into an MLP whose output goes through a norm.")
        batches = decoder.make_batches(self.text.sequences)
        states = [decoder.embed(batches)]
        for layer_states in decoder.walk(batches):
            states.append(list(layer_states))
        starts = range(1, decoder.num_layers - count + 1)
        start = min(starts, key=lambda start: _turned(states[start], states[start + count]))
        layer = decoder.layer(start - 1)
        hidden = model.config.hidden_size
        regression = Regression(hidden, hidden, decoder.device)
        for before, target in zip(states[start - 1], states[start + count], strict=True):
            residual = mid_state(decoder, layer, before)
            written = written_by(decoder, decoder.family.mlp, layer, residual)
            wanted = (target - residual).flatten(0, 1) / decoder.family.residual_factor(decoder.config)
            regression.add(written.flatten(0, 1), wanted, token_weights(decoder, target))
        regression.complete()
        through = regression.ridge(torch.eye(hidden), _MAP_RIDGE).weight
        regression.solver.check(regression.solver.codes().tolist())
        mapped = {}
        for name, part in layer.mlp.down_proj.named_parameters():  # it may have a bias
            mapped[f"mlp.down_proj.{name}"] = (through @ part.float()).to(part.dtype)
        decoder.replace(start - 1, mapped)
        for _ in range(count):
            decoder.remove(start)
        return model


def _turned(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How much a run of layers turns the stream: 1 minus the mean cosine, without each sequence's first token."""
    cosines = []
    for state, other in zip(before, after, strict=True):
        cosines.append(float(torch.cosine_similarity(state[:, 1:].float(), other[:, 1:].float(), dim=-1).mean()))
    return 1 - statistics.mean(cosines)


FUSIONS: dict[str, dict[str, Any]] = {
    "truncate": {"method": "truncate"},
    "mka": {"method": "mka"},
    "neural_alignment": {"method": "neural_alignment"},
    "mka, least_influence": {"method": "mka", "selection": "least_influence"},
    "neural_alignment, least_influence": {"method": "neural_alignment", "selection": "least_influence"},
    "drop by influence": {"method": "truncate", "selection": "least_influence"},
    "refit by influence": {"method": "refit", "selection": "least_influence"},
    "refit": {"method": "refit"},
    "drop by influence, healed": {"method": "truncate", "selection": "least_influence", "heal_tokens": None},
    "refit, healed": {"method": "healed"},
}
RIVALS: dict[str, Callable[[Rivals, CausalLM, int], CausalLM]] = {
    "drop by loss": Rivals.drop_by_loss,
    "cut and linear map": Rivals.cut_and_map,
}
WAYS = (*FUSIONS, *RIVALS)


@dataclass(frozen=True)
class Choice:
    """An answer to choose, in a sequence: the rows of states that predict its tokens."""

    rows: Tensor
    tokens: Tensor
    characters: int


@dataclass(frozen=True)
class Cloze:
    """A question and, side by side after it, all choices, none of which sees another: one sequence."""

    ids: Tensor  # (1, tokens T)
    positions: Tensor  # (1, T)
    mask: Tensor  # (1, 1, T, T)
    choices: list[Choice]
    answer: int

    @classmethod
    def pack(cls, tokenizer: PreTrainedTokenizerBase, question: Question) -> Cloze:
        prompt = tokenizer(f"Question: {question.question.strip()}\nAnswer:")["input_ids"]
        ids = list(prompt)
        positions = list(range(len(prompt)))
        choices = []
        blocks = []
        for text in question.choices:
            tokens = tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
            block = range(len(ids), len(ids) + len(tokens) - 1)
            rows = torch.tensor([len(prompt) - 1, *block])
            choices.append(Choice(rows, torch.tensor(tokens), max(1, len(text.strip()))))
            blocks.append(block)
            ids += tokens[:-1]
            positions += range(len(prompt), len(prompt) + len(block))
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        for block in blocks:
            mask[block.start : block.stop, len(prompt) : block.start] = False
        return cls(torch.tensor([ids]), torch.tensor([positions]), mask[None, None], choices, question.answer)

    @torch.inference_mode()
    def is_answered(self, model: CausalLM) -> bool:
        """Whether the right choice is the likeliest a character."""
        mask = torch.where(self.mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        output = model.model(input_ids=self.ids, position_ids=self.positions, attention_mask=mask, use_cache=False)
        [states] = output.last_hidden_state
        scores = []
        for choice in self.choices:
            logits = family_of(model.config).logits(model.config, model.lm_head(states[choice.rows]))
            log_probs = logits.float().log_softmax(-1).gather(1, choice.tokens[:, None])
            scores.append(float(log_probs.sum()) / choice.characters)
        return scores.index(max(scores)) == self.answer


class Judge:
    """Compares models with their base: cells of a row of the table."""

    def __init__(self, base: CausalLM, texts: dict[str, list[Tensor]], questions: Sequence[Cloze]) -> None:
        self.questions = questions
        self.judged = predict_texts(Decoder(base), texts, dict.fromkeys(texts, ""))
        self._head = base.lm_head.weight
        self.dense_correct = [question.is_answered(base) for question in questions]

    @property
    def heads(self) -> list[str]:
        """Of the columns of `figures`."""
        return [f"{figure.label}, {text.name}" for figure in FIGURES for text in self.judged]

    def figures(self, model: CausalLM) -> list[str]:
        """Each figure of all texts; of perplexity how many times the base's."""
        texts = judge(Decoder(model), self.judged, dense_head=self._head)
        cells = []
        for figure in FIGURES:
            values = [text.ratio if figure.change == "times" else text.figures[figure.name] for text in texts]
            cells += [format(value, figure.form) for value in values]
        return cells

    def quiz(self, model: CausalLM) -> str:
        """Accuracy, with its difference from the base's."""
        correct = [question.is_answered(model) for question in self.questions]
        changes = [float(a) - float(b) for a, b in zip(correct, self.dense_correct, strict=True)]
        error = statistics.stdev(changes) / len(changes) ** 0.5
        return f"{statistics.mean(correct):.3f} ({statistics.mean(changes):+.3f} +- {error:.3f})"


# What tiny models have of their own: a Llama unlike the base, a Gemma whose window is shorter than its text.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 16, "tie_word_embeddings": False},
    "cwm": {"bos_token_id": 0},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 64, "sliding_window_pattern": 6, "query_pre_attn_scalar": 32},
    "qwen3_5_text": {"linear_num_key_heads": 8, "linear_num_value_heads": 8},
}
TINY["qwen3_5_text"] |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
TINY["llama"] |= {"num_attention_heads": 6, "num_key_value_heads": 6}
MIXTURE: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 10, "num_attention_heads": 6}
MIXTURE |= {"moe_intermediate_size": 64, "num_experts_per_tok": 4}
TINY["qwen3_moe"] = MIXTURE | {"num_experts": 16, "norm_topk_prob": True}
TINY["qwen3_5_moe_text"] = MIXTURE | TINY["qwen3_5_text"] | {"num_experts": 16, "shared_expert_intermediate_size": 64}
TINY["gpt_oss"] = MIXTURE | {"num_local_experts": 16, "intermediate_size": 64, "sliding_window": 64}


def tiny_model(model_type: str, tokenizer: PreTrainedTokenizerBase, text: str, minutes: float) -> CausalLM:
    """A small model of a family, trained on text."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 12}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}
    settings |= {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    family = FAMILIES[model_type]
    model = family.causal_lm(family.config_class(**settings | TINY.get(model_type, {})))
    sequences = torch.stack([s for s in pack_tokens(tokenizer, text, 128, 10**9) if len(s) == 128])
    others: dict[str, Any] = {"output_router_logits": True} if family.mlp.experts else {}  # experts are balanced
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    end = time.monotonic() + 60 * minutes
    losses = [0.0]
    while time.monotonic() < end:
        batch = sequences[torch.randint(len(sequences), (8,))]
        loss = model(input_ids=batch, labels=batch, **others).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"Trained a model of {model.num_parameters():,} parameters: {len(losses)} steps, last loss {losses[-1]:.2f}.")
    return model.eval()


def smallest_window(model: CausalLM) -> float:
    """How many tokens, with its own, a token attends to at most in some layer."""
    family = family_of(model.config)
    has_window = any(family.has_window(model.config, layer) for layer in model.model.layers)
    return model.config.sliding_window if has_window else math.inf


def read_halves(path: Path) -> tuple[str, str]:
    """A file's text in two halves that end with a line."""
    text = path.read_text(encoding="utf-8")
    middle = len(text) // 2
    middle = max(middle, text.find("\n", middle))
    return text[:middle], text[middle:]


def read_questions(folder: Path, count: int) -> list[Question]:
    """Short questions of the MMLU release, drawn from all subjects."""
    questions = []
    for subject in SUBJECTS:
        for question in read_csv_questions(folder, "test", subject):
            if len(question.question) < 200 and max(map(len, question.choices)) < 80:
                questions.append(question)
    return random.Random(0).sample(questions, min(count, len(questions)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=MODELS, help="what scripts/environment fetches, once")
    parser.add_argument("--base", help="folder or hub name, in place of --model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--text", type=Path, help="a file of prose")
    parser.add_argument("--mmlu", type=Path, help="folder of the MMLU CSV release")
    parser.add_argument("--calibrate", default="default", choices=["default", "text"])
    parser.add_argument("--tokens", type=int, help="calibration tokens, by default as the model's width has it")
    parser.add_argument("--judge-tokens", type=int, default=8192, help="tokens of each judging text")
    parser.add_argument("--fusions", type=int, nargs="*", help="default: some that suit --model")
    parser.add_argument("--quiz-fusions", type=int, nargs="*", default=[4, 10])
    parser.add_argument("--questions", type=int, default=1500, help="of the quiz, at most")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="only these rows")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="DIR", help="made of the base by any program")
    parser.add_argument("--heal-tokens", type=int, help="tokens that healed rows are trained on, likewise")
    parser.add_argument("--tiny", type=float, metavar="MINUTES", help="train a tiny model on --text, and use that")
    families = sorted({*FAMILIES} & {*MODEL_TYPES})
    parser.add_argument("--family", default="llama", choices=families, help="of the tiny model")
    options = parser.parse_args()
    if options.questions < 2:
        parser.error("--questions must be 2 or more.")
    if (options.calibrate == "text" or options.tiny) and not options.text:
        parser.error("--calibrate text and --tiny need --text FILE.")
    return options


def open_base(options: argparse.Namespace, text: str, scratch: str) -> Base:
    """The base that was asked for; a tiny one is trained on some text first, and saved in a folder."""
    if options.tiny:
        text += documentation_halves()[0]
        tokenizer = make_tokenizer(2048, text)  # so few that a model learns in minutes
        tiny_model(options.family, tokenizer, text, options.tiny).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        return Base.open(scratch, {"dtype": options.dtype})
    folder = options.base
    if folder is None:
        folder = str(ROOT / ".cache" / options.model / "checkpoint")
        fetch, _ = MODELS[options.model]
        making = f". scripts/environment && {fetch} && as_checkpoint .cache/{options.model}"
        subprocess.run(["bash", "-c", making], cwd=ROOT, check=True)
    return Base.open(folder, {"dtype": options.dtype})


def open_ways(
    options: argparse.Namespace, opened: Base, base: CausalLM, calibration: TextSource | None
) -> tuple[Fuser, Rivals]:
    """All ways, which share what is measured on the base."""
    tokenizer = opened.tokenizer()
    given = FusionConfig(
        1, "healed", calibration_tokens=options.tokens, heal_tokens=options.heal_tokens, perplexity_tokens=0
    )
    by_default = for_model(given, base.config)
    settings: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": by_default.calibration_tokens}
    corpus = load_corpus(calibration, max_tokens=by_default.calibration_tokens)
    samples = load_calibration()
    measured = measure(Decoder(base), tokenizer, FusionConfig(1, **settings), samples, corpus)
    assert measured.text is not None
    print(f"Calibrated on {measured.text.source.tokens} tokens: {corpus.full_source}.")
    training_text = load_corpus(calibration, max_tokens=by_default.heal_tokens, to_train=True)
    fuser = Fuser(opened, tokenizer, settings, measured, training_text, by_default.heal_tokens)
    return fuser, Rivals(measured.text)


def main() -> None:
    options = parse_options()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    _, levels = MODELS[options.model]
    if options.fusions is not None:
        levels = options.fusions
    texts = {judging.name: judging.text for judging in judging_texts()}
    calibration: TextSource | None = None
    first_half = ""
    if options.text:
        first_half, second_half = read_halves(options.text)
        texts = {"text": second_half, **texts}
    if options.calibrate == "text":
        calibration = [first_half]
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_base(options, first_half, scratch)
        tokenizer = opened.tokenizer()
        base: CausalLM = opened.load().eval()
        num_layers = base.config.num_hidden_layers
        questions: list[Cloze] = []
        if options.mmlu and (options.checkpoints or set(options.quiz_fusions) & set(levels)):
            questions = [Cloze.pack(tokenizer, q) for q in read_questions(options.mmlu, options.questions)]
        longest = max((int(question.positions.max()) for question in questions), default=0)
        if longest >= smallest_window(base):
            raise SystemExit("Leave out --mmlu: the model's window is shorter than a question.")
        packed = {name: pack_tokens(tokenizer, text, LENGTH, options.judge_tokens) for name, text in texts.items()}
        compared = Judge(base, packed, questions)
        figures = [f"{text.name} {text.dense:.4g}" for text in compared.judged]
        if questions:
            figures.append(f"quiz {statistics.mean(compared.dense_correct):.3f}")
        print(f"Dense: {', '.join(figures)}.")
        if levels:
            fuser, rivals = open_ways(options, opened, base, calibration)
        heads = compared.heads
        print(f"\n| way | fused | {' | '.join(heads)} | quiz (diff) | seconds |")
        print("|---" * (4 + len(heads)) + "|")

        def show(name: str, count: int, model: CausalLM, seconds: float) -> None:
            quiz = ""
            if questions and (count in options.quiz_fusions or name in options.checkpoints):
                quiz = compared.quiz(model)
            cells = [name, str(count), *compared.figures(model), quiz, f"{seconds:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)

        for count in levels:
            for name in options.ways:
                start = time.monotonic()
                try:
                    if count >= num_layers:
                        raise ValueError(f"The model has only {num_layers} layers.")
                    model = copy.deepcopy(base)
                    if name in FUSIONS:
                        model = fuser.fuse(model, count, **FUSIONS[name])
                    else:
                        model = RIVALS[name](rivals, model, count)
                except ValueError as error:
                    print(f"<!-- {error} -->\n| {name} | {count} {'| - ' * (2 + len(heads))}|", flush=True)
                    continue
                show(name, count, model, time.monotonic() - start)
        for folder in options.checkpoints:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype).eval()
            show(folder, num_layers - model.config.num_hidden_layers, model, 0.0)


if __name__ == "__main__":
    main()
