"""The phases of a fusion in numbers: what is alive at once in each, and how many operations it takes.

Counted from the modules that do the work, by the symbols of a model's shape: each figure here is of what one of them
holds or computes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from lf_hf.plan.machine import Machine
from lf_hf.plan.shape import Shape
from lf_hf.runtime import amounts
from lf_hf.settings import FusionConfig, HealSettings

_OFFLOADED = 3  # layers that come and go: one that computes, one that is read, and one that is made
_OTHER_PIECES = 16  # that judge groups: of other kinds of text, about
_SAMPLES, _SAMPLE_LENGTH = 57, 128  # of the published method's default, about
_WRITTEN_SHARE, _HEALED_SHARE = 1 / 2, 1 / 3  # of texts to calibrate and to heal on that the model writes, at most
TRAINED_BYTES = 18  # of a trained parameter: master, gradient, two moments in float32, and a copy to compute in
STEP_BYTES = 60  # of it that AdamW and the copy read and write in a step

_LOOK = 8192  # tokens of a look at held-out text

Work = Counter[str]
"""Operations by the rate that bounds them. Flops: of whole layers, the `head`, each `product` in float32, and what is
`solve`d in float64. `logits` are numbers of a softmax, `calls` of a layer with a token each, and `bytes` what is moved.
"""


@dataclass(frozen=True)
class Need:
    """What a phase takes beside the model's weights: bytes where layers compute, bytes of lists of states, and work."""

    inside: int
    lists: int
    work: Work


@dataclass(frozen=True)
class Phases:
    """The phases of a fusion of a model, but for healing."""

    shape: Shape
    config: FusionConfig
    batch_bytes: int
    on_card: bool
    heal_tokens: int
    longest: int = 1  # layers that may become one
    on_disk: bool = False  # whether weights lie there, so that the models continue no prompts

    @property
    def fusions(self) -> int:
        """How many layers go, and at most so many are fused; where a budget says how many, one at least."""
        return self.config.num_fusions or 1

    @property
    def groups(self) -> int:
        """About how many groups there are: by cost few long ones are chosen, and by influence mostly pairs."""
        a_group = {"last": self.fusions, "least_influence": 4 / 3, "groups": 5 / 2}  # layers that go in it
        return max(1, round(self.fusions / a_group[self.config.selection]))

    @property
    def joined(self) -> int:
        """About how many layers a group has."""
        return 1 + math.ceil(self.fusions / self.groups)

    @property
    def passing(self) -> int:
        """Bytes of layers that come and go, and of embeddings, where weights lie elsewhere."""
        layers = _OFFLOADED + self.longest * self.config.fits
        return layers * self.shape.layer_bytes + self.shape.head * self.shape.size

    @property
    def written(self) -> int:
        """Bytes of a file of the result, which are in memory while it is written if they lie elsewhere."""
        return min(self.shape.bytes, max(amounts.MAX_SHARD_BYTES, self.shape.head * self.shape.size))

    @property
    def least(self) -> int:
        """What would do beside what is taken before there are weights: with all of them here, or all elsewhere."""
        inside = self.most("elsewhere")
        return min(inside + self.shape.bytes, max(inside + self.passing, self.written))

    @property
    def lists(self) -> int:
        """The most bytes of lists of states."""
        return max(need.lists for need in self.needs.values())

    def most(self, states: str) -> int:
        """The most bytes of a phase, with lists of states where these are on the "device"."""
        return max(need.inside + need.lists * (states == "device") for need in self.needs.values())

    @cached_property
    def needs(self) -> dict[str, Need]:
        """The phases by name, in their order."""
        phases = {"measure": self._measure()}
        if self.config.needs_text:
            phases["choose"] = self._choose()
        phases["make"] = self._make()
        phases["judge"] = self._judge()
        return phases

    def _batch(self, length: int, tokens: int) -> int:
        """How many of some tokens pass a layer together, in sequences of `length`."""
        return min(tokens, amounts.batch_size(length, self.shape.mlp, self.batch_bytes) * length)

    def _running(self, length: int, tokens: int) -> int:
        """Bytes inside a layer: gate, its activation, up and their product; the stream, norms and all of attention.

        No kernel of a card takes grouped heads in float32 without all scores: these, softmaxes and which are masked.
        """
        shape = self.shape
        scores = 0  # of a token
        if self.on_card and shape.size == 4 and shape.keys < shape.queries:
            scores = 10 * shape.heads * min(length, shape.positions)
        return self._batch(length, tokens) * ((4 * shape.mlp + 10 * shape.hidden) * shape.size + scores)

    def _states(self, tokens: int) -> int:
        """Bytes of a list of the states of so many tokens."""
        return tokens * self.shape.hidden * self.shape.size

    def _forward(self, tokens: int, layers: int) -> Work:
        return Work(layer=2 * self.shape.layer * tokens * layers)

    def _head(self, tokens: int, models: int = 1) -> Work:
        logits = tokens * self.shape.vocab * models
        return Work(head=2 * self.shape.hidden * logits, logits=logits)

    def _logits(self, tokens: int, models: int) -> int:
        """Bytes of logits of some models, of at most so many tokens.

        On a card each model also has float32 log-probabilities, and the one that is compared needs three more of these.
        """
        of_number = models * (self.shape.size + 4 * self.on_card) + 12 * self.on_card
        return min(amounts.LOGITS, tokens * self.shape.vocab) * of_number

    def _written(self, rows: int, steps: int) -> tuple[int, Work]:
        """Bytes and work of text that a model writes, `rows` sequences together."""
        shape = self.shape
        of_layer = rows * steps * 2 * shape.keys * shape.size
        cache = of_layer * (shape.layers + 1)  # one of them beside what it grows to
        logits = rows * shape.vocab * (shape.size + 12 * self.on_card)  # float32, softmax and its sums
        work = self._forward(rows * steps, shape.layers) + self._head(rows * steps)
        work += Work(calls=steps * shape.layers, bytes=of_layer * shape.layers * steps // 2)  # written anew each step
        work += Work(bytes=steps * shape.bytes * self.on_disk)  # read for each token
        return cache + logits, work

    def _measure(self) -> Need:
        """Judging, what the model writes, and samples or the final states of what is healed on."""
        shape, config = self.shape, self.config
        judged = 2 * config.perplexity_tokens
        samples = _SAMPLES * _SAMPLE_LENGTH * config.averages
        inside = self._running(amounts.PERPLEXITY_LENGTH, max(judged // 2, self.heal_tokens, samples))
        inside += self._logits(self._batch(amounts.PERPLEXITY_LENGTH, judged // 2), 1)
        lists = self._states(judged + 2 * samples)
        work = self._forward(judged + samples + self.heal_tokens, shape.layers) + self._head(judged)
        if config.perplexity_tokens and not self.on_disk:
            work += self._written(4, 24)[1]
        written_tokens = [self.heal_tokens * _HEALED_SHARE]
        if config.needs_text:
            written_tokens.append(config.calibration_tokens * _WRITTEN_SHARE)
        for tokens in filter(None, written_tokens):
            rows = int(tokens) // amounts.WRITTEN_LENGTH
            written, of_text = self._written(min(rows, amounts.WRITTEN_TOGETHER), amounts.WRITTEN_LENGTH)
            inside = max(inside, written)
            work += times(of_text, max(1, rows / amounts.WRITTEN_TOGETHER))
        return Need(inside, lists, work)

    def _judge(self) -> Need:
        """Both models on the judging texts, and what the fused one writes."""
        judged = 2 * self.config.perplexity_tokens
        inside = self._running(amounts.PERPLEXITY_LENGTH, judged // 2)
        inside += self._logits(self._batch(amounts.PERPLEXITY_LENGTH, judged // 2), 2)
        work = self._forward(judged, self.shape.layers - self.fusions) + self._head(judged, 2)
        if self.config.perplexity_tokens and not self.on_disk:
            work += self._written(4, 24)[1]
        return Need(inside, 2 * self._states(judged), work)

    def _choose(self) -> Need:
        shape, length = self.shape, self.config.calibration_length
        if self.config.selection != "groups":  # by influence, on some text
            tokens = min(8192, self.config.calibration_tokens) * (self.config.selection == "least_influence")
            return Need(self._running(length, tokens), 2 * self._states(tokens), self._forward(tokens, shape.layers))
        fitted = min(amounts.num_rough_tokens(shape.mlp), self.config.calibration_tokens)
        of_text = min(amounts.JUDGING_PIECES, int(self.config.calibration_tokens * (1 - _WRITTEN_SHARE)) // length // 2)
        pieces = of_text + _OTHER_PIECES
        judging = pieces * amounts.JUDGING_LENGTH  # of sets; a part of it judges groups
        judging_groups = judging // amounts.JUDGING_PART + 2 * amounts.JUDGING_LENGTH  # by twos
        # No more sets than there are ways to join so many layers, of which neither the first nor the last is one.
        trials = min(amounts.num_trials(self.config.calibration_tokens), math.comb(shape.layers - 3, self.fusions))
        short = sum(shape.layers - 2 - more for more in range(1, min(self.fusions, amounts.SHORT) + 1))
        measured = short + trials  # and those of the sets, of which about one is new in each
        stride = amounts.judged_stride(shape.vocab)
        # Lists: at all boundaries, inside a group, of groups that are judged, and above those of sets.
        lists = self._states((shape.layers + 1) * (fitted + judging) + (2 * self.longest + 3) * fitted)
        lists += self._states(measured * judging_groups + trials * self.groups * (fitted + judging))
        longest_fit, _ = self._fit(fitted, self.longest, rough=True)
        _, of_short = self._fit(fitted, 2, rough=True)
        _, of_sets = self._fit(fitted, self.joined, rough=True)
        # Sets are judged one by one, and some groups beside each other.
        set_logits = self._logits(self._batch(amounts.JUDGING_LENGTH, judging) // stride, 2)
        models = min(amounts.JUDGED_AT_ONCE, short) + 1
        group_logits = self._logits(self._batch(amounts.JUDGING_LENGTH, judging_groups) // stride, models)
        of_piece = min(length, amounts.JUDGING_LENGTH)
        running = self._running(length, max(fitted, pieces * of_piece))
        inside = running + max(longest_fit, set_logits, group_logits)
        work = self._forward(fitted * 2 + judging, shape.layers)
        # What a group gives runs through the layers above it, on average a half, and sets from their first group up.
        work += self._forward(measured * judging_groups, shape.layers // 2)
        work += self._forward(trials * (fitted + judging), shape.layers * 2 // 3)
        work += self._head((measured * judging_groups + trials * judging) // stride)
        return Need(inside, lists, work + times(of_short, measured) + times(of_sets, trials * self.groups))

    def _make(self) -> Need:
        shape, config = self.shape, self.config
        made = self.fusions * shape.layer_bytes  # at most
        if config.averages:
            rows = shape.mlp if config.alignment != "none" else 0
            return Need(made + 12 * rows**2 + 12 * shape.hidden * rows, 0, self._average())
        if not config.fits:
            return Need(made, 0, Work())
        tokens, length = config.calibration_tokens, config.calibration_length
        inside, _ = self._fit(tokens, self.longest, rough=False)
        tuned = TRAINED_BYTES * shape.layer + max(amounts.STEP_TOKENS, length) * activation_bytes(shape)
        passes = amounts.num_passes(tokens)
        # One stream from the first to the last group, and the dense one up to that: as long as all layers together.
        work = self._forward(tokens, shape.layers)
        _, of_fit = self._fit(tokens, self.joined, rough=False)
        trained = Work(layer=5 * shape.layer * passes * tokens)  # some gradients of what it reads are not needed
        trained += Work(bytes=passes * tokens // amounts.STEP_TOKENS * STEP_BYTES * shape.layer)
        # Lists: between the halves of each layer; before all of them, after all attention and after all of them; of the
        # model as it becomes.
        lists = self._states((self.longest + 4) * tokens)
        inside = self._running(length, tokens) + made + max(inside, tuned)
        return Need(inside, lists, work + times(of_fit + trained, self.groups))

    def _average(self) -> Work:
        """Rows of all projections compared, and assigned: the solver's steps grow about as rows to the power 2.5."""
        shape = self.shape
        work = Work(bytes=self.fusions * shape.layer * 40)
        if self.config.alignment != "none":
            for rows in (shape.mlp, shape.mlp, shape.hidden, shape.queries, shape.keys, shape.keys, shape.hidden):
                work += Work(product=2 * rows * rows * shape.hidden, bytes=int(12 * rows**2.5))
        return times(work, self.fusions)

    def _fit(self, tokens: int, joined: int, *, rough: bool) -> tuple[int, Work]:
        """Bytes, but for lists of states, and work of the fit of `joined` layers as one."""
        shape, batch = self.shape, self._batch(self.config.calibration_length, tokens)
        hidden, mlp, size = shape.hidden, shape.mlp, shape.size
        wide, heads = joined * mlp, joined * shape.queries
        compared = mlp if rough else amounts.num_candidates(wide, mlp)
        # The maps, a reader in float32, and the wide half in its own numbers; then its compared channels, twice.
        widened = 4 * joined * hidden**2 + 8 * hidden * mlp + 3 * hidden * max(wide, 2 * compared) * size
        chosen = 3 * hidden * (compared + mlp) * size
        of_maps, map_work = self._problem(tokens, hidden, hidden, joined * hidden, rough=rough)
        of_heads, head_work = self._problem(tokens, heads, shape.queries, hidden, rough=rough)
        solving, channel_work = self._problem(tokens, compared, mlp, hidden, rough=rough)
        if shape.has_norm_after:  # the second problem beside the first one
            solving += 4 * (mlp**2 + hidden * mlp)
        channels = batch * max(compared, heads) * (3 * size + 4)  # gate, up, their product, and it in float32
        inside = channels + max(widened, of_maps, chosen + solving, chosen + of_heads)
        mapped = 2 * compared + joined * (shape.queries + 2 * shape.keys)  # rows of readers
        work = self._forward(tokens, 0 if rough else joined)  # in choosing layers run once for all groups
        work += times(map_work, 2)
        work += Work({self._own_product: 2 * hidden**2 * mapped})
        twice = 1 + shape.has_head_norms
        work += Work(layer=2 * tokens * hidden * (shape.queries + 2 * shape.keys) * joined * twice)
        if compared < wide:  # by some of the tokens
            work += Work(layer=tokens // amounts.TOKEN_STRIDE * hidden * (4 * wide + 2 * joined * hidden))
        work += Work(layer=4 * tokens * hidden * compared)
        work += head_work + channel_work
        if shape.has_norm_after:
            work += Work(layer=12 * tokens * hidden * (mlp + shape.queries))
            if not rough:
                work += self._problem(tokens, mlp, mlp, hidden, rough=False)[1]
        return inside, work

    @property
    def _own_product(self) -> str:
        """The rate of products of factors in the model's own numbers; float16 is multiplied in float32, slower."""
        return "layer" if self.shape.size == 2 else "product"

    def _problem(self, tokens: int, unknowns: int, kept: int, outputs: int, *, rough: bool) -> tuple[int, Work]:
        """Bytes and work of a least-squares problem: sums, a pruning by an inverse, and the solution of the rest.

        A rough fit solves some in its tokens.
        """
        if rough and amounts.solved_in_tokens(tokens, unknowns):
            return self._dual_problem(tokens, unknowns, kept, outputs)
        limit = amounts.ROUGH_EXACT_LIMIT if rough else amounts.EXACT_LIMIT
        exact = 8 if unknowns <= limit else 4
        squares = 3 if self.on_card and kept < unknowns else 1  # an inverse on a card is made beside its factor
        size = (4 + squares * exact) * unknowns**2 + (12 + 2 * exact) * unknowns * outputs
        work = Work(product=tokens * unknowns * (unknowns + 2 * outputs))  # half of a gram matrix, and what it is for
        for size_of in {unknowns, kept}:
            rate = "solve" if size_of <= limit else "product"
            flops = size_of**3 // 3 + 2 * size_of**2 * outputs
            if size_of > kept:  # the inverse, and its updates
                flops += 2 * size_of**3 // 3 + 2 * (size_of**3 - kept**3) // 3
            work += Work({rate: flops}) + Work(product=2 * size_of**2 * outputs)
        return size, work

    def _dual_problem(self, tokens: int, unknowns: int, kept: int, outputs: int) -> tuple[int, Work]:
        """The same where it is solved in the tokens: no more of the inverse than blocks on its diagonal."""
        # x twice; the kernel, and it in float64; two weights; what is to be written, and what is missed of it.
        size = 8 * tokens * unknowns + 12 * tokens**2 + 8 * unknowns * outputs + 32 * tokens * outputs
        work = Work()
        for inputs in {unknowns, kept}:
            work += Work({self._own_product: tokens**2 * inputs + 4 * tokens * inputs * outputs})
            work += Work(solve=tokens**3 // 3 + 2 * tokens**2 * outputs + tokens**2 * inputs * (inputs > kept))
        return size, work


def times(work: Work, count: float) -> Work:
    return Work({name: int(amount * count) for name, amount in work.items()})


def activation_bytes(shape: Shape) -> int:
    """Bytes that a layer keeps of a token for its gradient under autocast, by what torch saves.

    Each norm: what it reads and what it gives in float32, and a bfloat16 copy. Attention: queries, keys and values in
    front of rotary embeddings and behind them, keys for all queries, and their norms. The MLP: gate, up, the activation
    and their product.
    """
    norms = 4 if shape.has_norm_after else 2
    of_heads = 8 * (shape.queries + shape.keys) * shape.has_head_norms
    mixer = max(8 * (shape.queries + 2 * shape.keys) + of_heads, shape.delta)
    return 10 * norms * shape.hidden + mixer + 8 * shape.mlp


def healing_bytes(shape: Shape, machine: Machine, layers: int, trained: int, tokens: int, *, checkpoints: bool) -> int:
    """Bytes of a training, of so many tokens at a time."""
    size = 2 if machine.bfloat16 else 4
    model = shape.total - (shape.layers - layers) * shape.layer
    fixed = model * shape.size + (TRAINED_BYTES if machine.bfloat16 else 16) * trained
    if size != shape.size:  # copies of what is not trained, in the type that training computes in
        fixed += max(0, model - trained) * size
    if machine.shards > 1:  # all of it in float32, as shards are of one type
        fixed = (4 * model + (TRAINED_BYTES - 4) * trained) // machine.shards
    # What a layer keeps; with checkpoints that of one layer, and the stream in front of each.
    a_token = activation_bytes(shape) * size // 2 * (1 if checkpoints else layers)
    a_token += 4 * shape.hidden * layers * checkpoints
    a_token += 14 * shape.hidden  # the embedded stream, and the final norm
    # Both models' slices of logits, and softmaxes of a few of them in float32.
    logits = tokens * shape.vocab
    floats = min(logits, amounts.FLOAT_LOGITS if machine.has_card else amounts.FLOAT_LOGITS_ON_CPU)
    return fixed + tokens * a_token + 2 * size * min(logits, amounts.TRAINED_LOGITS) + 24 * floats


def healing_work(shape: Shape, layers: int, trained: int, healing: HealSettings, *, checkpoints: bool) -> Work:
    """Steps, and looks at held-out text: forward, gradients of states and of what trains, and both models' heads."""
    tokens = healing.tokens
    weight_gradients = 2 * min(trained, layers * shape.layer)
    a_token = (4 + 2 * checkpoints) * layers * shape.layer + weight_gradients
    steps = max(1, tokens // healing.batch_tokens)
    seen = (min(amounts.EVALUATIONS, steps) + 1) * _LOOK
    work = Work(layer=tokens * a_token, head=tokens * 6 * shape.head, logits=3 * tokens * shape.vocab)
    work += Work(layer=seen * 2 * layers * shape.layer, head=seen * 4 * shape.head, logits=2 * seen * shape.vocab)
    return work + Work(bytes=steps * STEP_BYTES * trained)
