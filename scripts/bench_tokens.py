#!/usr/bin/env python3
"""How many tokens a fit takes, by the MLP channel: one table of rough fits, which choose groups, and one of final fits.

    .venv/bin/python scripts/bench_tokens.py BASE --fusions 4 --text wiki.txt

The calibration text is the bundled one, as much as `refit` takes by default. Each number of --rough tokens a channel
chooses groups, which are then made with a third of that text; each number of --final ones makes the same groups, those
of --groups (5-7,9-11) or what the default number chooses. Both are judged as in bench_quality.py. `seconds` are of
the CPU, of choosing in the one table and of making in the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench_quality import LENGTH, Judge, read_halves
from torch import Tensor
from transformers.utils import logging

from lf_hf import FusionConfig
from lf_hf.checkpoint.base import Base
from lf_hf.choose.choice import try_sets
from lf_hf.choose.costs import GroupCosts, split_text
from lf_hf.choose.methods import MAKING
from lf_hf.decoder.decoder import Decoder, Groups
from lf_hf.measure.dense import Measurements, measure
from lf_hf.pipeline.fusion import for_model
from lf_hf.runtime.amounts import num_rough_tokens, num_trials
from lf_hf.text.calibration import load_calibration, load_corpus
from lf_hf.text.judging import judging_texts
from lf_hf.text.packing import pack_tokens

_PART = 1 / 3  # of the text, of which groups are made that rough fits choose


def choose_roughly(dense: Decoder, measured: Measurements, config: FusionConfig, tokens: int) -> Groups:
    """The best set of groups by fits to so many tokens."""
    assert measured.text is not None
    text = split_text(measured.text, tokens)
    costs = GroupCosts(dense, text, partial(MAKING[config.method].roughly, ridge=config.ridge))
    trials = try_sets(costs, config.num_fusions, num_trials(measured.text.source.tokens))
    return min(trials, key=lambda groups: trials[groups])


def with_part(measured: Measurements, part: float) -> Measurements:
    """The same measurements with part of the text to fit to, spread evenly over it."""
    assert measured.text is not None
    given, written = (spread(sequences, part) for sequences in (measured.text.given, measured.text.written))
    return replace(measured, text=measured.text._replace(given=given, written=written))


def spread(sequences: Sequence[Tensor], part: float) -> list[Tensor]:
    count = min(len(sequences), max(1, round(part * len(sequences))))
    return [sequences[number * len(sequences) // count] for number in range(count)]


def made(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Decoder:
    """The model with each of some groups made one layer."""
    decoder = dense.copy()
    removed = 0
    for weights, kind, entry in MAKING[config.method].make(dense, groups, config, measured):
        first, *_, last = entry.layers
        decoder.join((first - removed, last - removed), weights, kind)
        removed += last - first
    return decoder


def parse_groups(text: str) -> Groups:
    ends = [group.split("-") for group in text.split(",")]
    return tuple((int(first), int(last)) for first, last in ends)


def named(groups: Groups) -> str:
    return ", ".join(f"{first}-{last}" for first, last in groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="folder or hub name")
    parser.add_argument("--fusions", type=int, default=4)
    parser.add_argument("--text", type=Path, required=True, help="a file of prose; its second half judges")
    parser.add_argument("--rough", type=float, nargs="*", default=[0.3, 0.7, 1.3, 2.7], metavar="TOKENS")
    parser.add_argument("--final", type=float, nargs="*", default=[3.4, 9, 18, 32], metavar="TOKENS")
    parser.add_argument("--groups", type=parse_groups, help="that final fits make, by default those that are chosen")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    opened = Base.open(options.base, {"dtype": options.dtype})
    tokenizer = opened.tokenizer()
    dense = Decoder(opened.load().eval())
    channels = dense.config.intermediate_size
    texts = {"text": read_halves(options.text)[1], **{judging.name: judging.text for judging in judging_texts()}}
    packed = {name: pack_tokens(tokenizer, text, LENGTH, 8192) for name, text in texts.items()}
    compared = Judge(dense.model, packed, [])
    config = for_model(FusionConfig(options.fusions, "refit", perplexity_tokens=0), dense.model_config)
    corpus = load_corpus(max_tokens=config.calibration_tokens)
    measured = measure(dense, tokenizer, config, load_calibration(), corpus)
    assert measured.text is not None
    whole = measured.text.source.tokens
    heads = compared.heads

    def show_heads(title: str) -> None:
        print(f"\n| {title} | a channel | groups | {' | '.join(heads)} | seconds |")
        print("|---" * (4 + len(heads)) + "|")

    def show(tokens: int, groups: Groups, figures: Sequence[str], seconds: float) -> None:
        cells = [str(tokens), f"{tokens / channels:.1f}", named(groups), *figures, f"{seconds:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)

    show_heads("rough fits")
    figures: dict[Groups, list[str]] = {}
    for each in options.rough:
        begun = time.process_time()
        groups = choose_roughly(dense, measured, config, round(each * channels))
        seconds = time.process_time() - begun
        if groups not in figures:
            figures[groups] = compared.figures(made(dense, groups, config, with_part(measured, _PART)).model)
        show(round(each * channels), groups, figures[groups], seconds)
    show_heads("final fits")
    if options.final:
        groups = options.groups or choose_roughly(dense, measured, config, num_rough_tokens(channels))
    for each in options.final:
        begun = time.process_time()
        decoder = made(dense, groups, config, with_part(measured, each * channels / whole))
        seconds = time.process_time() - begun
        show(round(each * channels), groups, compared.figures(decoder.model), seconds)


if __name__ == "__main__":
    main()
