"""What is measured on the dense model, once for any number of fusions of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.decoder.generating import continuations, generate
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.predictions import batched, final_states, predictions
from lf_hf.report.records import CalibrationInfo, Continuation, PerplexityInfo
from lf_hf.runtime.fields import plural
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import FusionConfig
from lf_hf.stages.activations import sample_distances
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.similarity import layer_similarity
from lf_hf.text.calibration import CalibrationSamples, Corpus
from lf_hf.text.chats import CHATS, chat_form, chat_text, first_token, special_tokens
from lf_hf.text.judging import PROMPTS, QUESTION, Relation, judging_texts, nearest, relation
from lf_hf.text.packing import check_ids, interleaved, pack_corpus, pack_other_text, pack_tokens, tokenize_samples

logger = logging.get_logger(__name__)

PERPLEXITY_LENGTH = 512  # tokens of a sequence on which perplexity is measured
CONTINUED_LENGTH = 24  # tokens that are added to a prompt
MOST_READ = 1 << 26  # bytes that may be read from a disk for each of these
WRITTEN_LENGTH = 128  # tokens of a text that the model writes: all weights are read once for each


@dataclass(frozen=True)
class Judged:
    """A text that predictions are measured on, and what the dense model predicts there."""

    name: str
    source: str
    ids: list[Tensor]  # batches of token ids of shape (sequences B, tokens T): this process's share
    tokens: int  # of all processes
    states: list[Tensor]  # the dense model's final ones of each batch, (B, T, hidden), in the machine's memory
    dense: float  # its perplexity
    to_samples: Relation  # how the text relates to the calibration samples
    to_text: Relation  # and to the calibration text


@dataclass(frozen=True)
class Measurements:
    """What is measured on the dense model before it is fused.

    It serves any number of fusions, whose settings differ in how layers are chosen and made one, and no others.
    """

    judged: list[Judged]  # none where no tokens were asked for
    seconds: dict[str, float]
    similarity: NDArray[np.float64] | None = None  # of shape (layers L, layers L)
    embeddings: NDArray[np.float64] | None = None  # of shape (L, samples N, d)
    sample_labels: list[str] | None = None  # MMLU subject of each sample
    influences: list[float] | None = None  # how much each layer changes the residual stream, on the samples
    samples_source: CalibrationInfo | None = None  # where the samples behind `similarity` came from
    given: list[Tensor] = field(default_factory=list)  # calibration text: int64, (tokens T,) each
    written: list[Tensor] = field(default_factory=list)  # what the model writes of it, which judges nothing
    other_text: list[Tensor] = field(default_factory=list)  # pieces of text of other kinds, which only judge
    text_note: str = ""  # what users should know of that text
    text_source: CalibrationInfo | None = None  # where `text` came from
    continuations: dict[str, str] = field(default_factory=dict)  # `written_on`; none where it would take long
    # Costs of groups of layers, by the settings that they depend on; what a fusion measures is added.
    group_costs: dict[tuple[Any, ...], dict[tuple[int, int], float]] = field(default_factory=dict)
    base_digest: str | None = None  # `lf_hf.runtime.numerics.weights_digest` of the model
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> list[Tensor]:
        """What is given and what the model writes, in turns."""
        return interleaved(self.given, self.written)

    def sources(self, config: FusionConfig) -> list[CalibrationInfo]:
        """Where the calibration text that a fusion with `config` uses came from."""
        sources = [(config.needs_similarity, self.samples_source), (config.needs_text, self.text_source)]
        return [source for needed, source in sources if needed and source is not None]


def measure(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: CalibrationSamples | None,
    text: Corpus | None,
) -> Measurements:
    """Measure perplexity, layer similarity where there are samples, and take calibration text.

    Raises
    ------
    ValueError
        If there are too few samples or too little text, or activations are not finite.
    """
    clock = Clock()
    with clock("perplexity"):
        judged = _judged(decoder, tokenizer, config, samples, text)
    fields: dict[str, Any] = {"base_digest": weights_digest(decoder.named_parameters())}
    notes = []
    if config.perplexity_tokens:
        with clock("continuations"):
            fields["continuations"] = decoder.processes.broadcast_object(
                lambda: written_on(decoder, tokenizer) if decoder.bytes_read <= MOST_READ else {}
            )
        if not judged:
            notes.append("No perplexity: this Python comes without the texts that it is measured on.")
    if samples is not None:
        fields |= decoder.processes.broadcast_object(lambda: _similarity(decoder, tokenizer, config, samples, clock))
        notes += fields.pop("notes")
    if text is not None:
        with clock("calibration text"):
            given, written = calibration_sequences(decoder, tokenizer, text, config)
            length = min(config.calibration_length, decoder.config.max_position_embeddings)
            fields["other_text"] = pack_other_text(tokenizer, text, length, decoder.config.vocab_size)
        has_chats = written and chat_form(tokenizer, decoder.config.vocab_size)
        chats = f", {len(written[CHATS])} sequences of it as chats" if has_chats else ""
        both = [*given, *written]
        fields |= {
            "given": given,
            "written": written,
            "text_note": text.note,
            "text_source": CalibrationInfo(text.full_source + chats, len(both), sum(map(len, both))),
        }
    for note in notes:
        logger.warning(note)
    return Measurements(judged, clock.seconds, notes=notes, **fields)


def _similarity(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: CalibrationSamples,
    clock: Clock,
) -> dict[str, Any]:
    """Stages 1 to 3, on the samples."""
    notes = []
    config.check_num_samples(len(samples.texts))
    ids = tokenize_samples(tokenizer, samples, config.sample_length, decoder.config.vocab_size)
    longest, different = max(map(len, ids)), len({tuple(sample.tolist()) for sample in ids})
    if longest == 1 or different < config.samples_needed:
        notes.append(
            f"The layer similarities are noise: of {len(ids)} calibration samples {different} differ, and the longest "
            f"has {longest} {plural(longest, 'token')}; give {config.samples_needed} different samples of text or more."
        )
    with clock("activations"):  # stage 1
        distances, influences = sample_distances(decoder, ids)
    with clock("manifold"):  # stage 2
        kernel = {name: getattr(config, name) for name in ("kernel_scale", "kernel_alpha", "embedding_dim")}
        embeddings = np.stack([diffusion_embedding(layer, **kernel) for layer in distances])
    with clock("similarity"):  # stage 3
        similarity = layer_similarity(
            embeddings,
            mi_neighbors=config.mi_neighbors,
            entropy_neighbors=config.entropy_neighbors,
            rank_normalize=config.rank_normalize,
            seed=config.seed,
        )
    return {
        "similarity": similarity,
        "embeddings": embeddings,
        "sample_labels": samples.labels,
        "influences": influences if longest > 1 else None,  # each sample's first token is left out
        "samples_source": CalibrationInfo(samples.source, len(ids), sum(map(len, ids))),
        "notes": notes,
    }


def calibration_sequences(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, text: Corpus, config: FusionConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Calibration text that is given, and what the model writes of it: int64 tensors of shape (tokens T,)."""
    model, share, tokens = decoder.config, text.generated_share, config.calibration_tokens
    length = min(config.calibration_length, model.max_position_embeddings)
    short = min(WRITTEN_LENGTH, length)
    # The text that is given fills one sequence at least.
    count = max(0, min(int(tokens * share), tokens - length)) // short
    given = pack_corpus(tokenizer, text, length, tokens - count * short, model.vocab_size)
    count = min(count, round(sum(map(len, given)) * share / (1 - share) / short))  # short text keeps its share
    if not count:
        return given, []
    form = chat_form(tokenizer, model.vocab_size)
    begins, special = first_token(tokenizer), special_tokens(tokenizer)
    return given, generate(decoder, count, short, config.seed, form, begins, special)


def _judged(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: CalibrationSamples | None,
    text: Corpus | None,
) -> list[Judged]:
    """The judging texts as sequences, with the dense model's perplexity on each."""
    if config.perplexity_tokens == 0:
        return []
    texts, length = judging_texts(), min(PERPLEXITY_LENGTH, decoder.config.max_position_embeddings)
    sequences = {
        judging.name: pack_tokens(tokenizer, judging.text, length, config.perplexity_tokens) for judging in texts
    }
    for sequence in itertools.chain(*sequences.values()):
        check_ids(int(sequence.max()), decoder.config.vocab_size)
    ids = batched(decoder, sequences)
    states = final_states(decoder, ids, "Perplexity before fusing")
    dense = predictions(decoder, ids, states)
    compared = samples.texts if samples is not None else []
    fitted = text.parts if text is not None else {}
    return [
        Judged(
            name=judging.name,
            source=judging.source,
            ids=ids[judging.name],
            tokens=sum(map(len, sequences[judging.name])),
            states=[state.cpu() for state in states[judging.name]],
            dense=dense[judging.name].perplexity,
            to_samples=relation(judging, ["\n\n".join(compared)]),
            to_text=relation(judging, fitted.values(), fitted),
        )
        for judging in texts
        if judging.name in dense
    ]


def written_on(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What the model adds to each of `PROMPTS`, and to `QUESTION` if its tokenizer has chats, up to its end."""
    vocab_size = decoder.config.vocab_size
    prompts = {prompt: tokenizer(prompt)["input_ids"] for prompt in PROMPTS}
    if not all(prompts.values()):
        return {}
    check_ids(max(map(max, prompts.values())), vocab_size)
    with suppress(ValueError):  # without a template, or with one that takes no question alone
        chat = chat_text(tokenizer, [{"role": "user", "content": QUESTION}], to_reply=True)
        ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        if ids and max(ids) < vocab_size:  # a template may be there that the model knows nothing of
            prompts[f"In the chat template: {QUESTION}"] = ids
    ends = decoder.config.eos_token_id
    stop = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if form := chat_form(tokenizer, vocab_size):
        stop.add(form.replied[0])
    added = continuations(decoder, [torch.tensor(ids) for ids in prompts.values()], CONTINUED_LENGTH)
    texts = {}
    for (prompt, ids), written in zip(prompts.items(), added, strict=True):
        kept = list(itertools.takewhile(lambda token: token not in stop, written.tolist()))
        # Many tokenizers take a space off the beginning of what they decode.
        before, whole = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (ids, [*ids, *kept]))
        texts[prompt] = whole[len(before) :]
    return texts


def perplexities(decoder: Decoder, measured: Measurements, config: FusionConfig) -> list[PerplexityInfo]:
    """Perplexity of the fused model beside that of the dense one, and how far apart they are, on each judging text."""
    ids = {text.name: text.ids for text in measured.judged}
    states = final_states(decoder, ids, "Perplexity after fusing")
    fused = predictions(decoder, ids, states, {text.name: text.states for text in measured.judged})
    return [
        PerplexityInfo(
            name=text.name,
            text=text.source,
            tokens=text.tokens,
            dense=text.dense,
            fused=fused[text.name].perplexity,
            relation=nearest(
                text.to_samples if config.needs_similarity else "unseen",
                text.to_text if config.needs_text else "unseen",
            ),
            divergence=fused[text.name].divergence,
            agreement=fused[text.name].agreement,
        )
        for text in measured.judged
    ]


def continued(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, measured: Measurements) -> list[Continuation]:
    """How the fused model goes on from each prompt, beside the dense one, where that is known."""
    if not measured.continuations:
        return []
    fused = decoder.processes.broadcast_object(lambda: written_on(decoder, tokenizer))
    return [Continuation(prompt, dense, fused[prompt]) for prompt, dense in measured.continuations.items()]


class Clock:
    """Seconds by name, added up over `with clock(name):` blocks."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
