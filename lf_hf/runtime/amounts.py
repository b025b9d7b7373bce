"""How much of everything a fusion takes: numbers that both the plan and the work follow."""

from __future__ import annotations

LONGEST_GROUP = 6  # layers that selection="groups" makes one, at most; more only where so many have to go
PERPLEXITY_LENGTH = 512  # tokens of a sequence on which perplexity is measured
JUDGING_LENGTH = 128  # of a sequence that judges fused layers
WRITTEN_LENGTH = 128  # of a sequence that a model writes: all weights are read once for each of them
# Sequences that a model writes together, as their keys and values take memory; a multiple of the step of `CHATS`.
WRITTEN_TOGETHER = 256
# Of an output file, about: of weights that lie elsewhere one is in memory while it is written.
MAX_SHARD_BYTES = 500_000_000
# Bytes that a batch may take inside a layer: on the CPU, where more gains nothing, and on a large card.
CPU_BATCH, LARGEST_BATCH = 1 << 26, 1 << 32
BATCH_COPIES = 64  # bytes for each token and channel of an MLP: several copies, of several layers side by side
# Share of the tokens that a model itself writes, which keeps what no other text touches: of the default mixture to fit
# to, and of all other text.
MIXTURE_SHARE, WRITTEN_SHARE = 0.5, 1 / 3
OUT_OF_DOMAIN_TOKENS = 1024  # that judge groups, of each kind of text beside the calibration text
JUDGING_PIECES = 16  # pieces of the calibration text that judge groups, beside other kinds of text
JUDGING_PART = 4  # one of so many pieces judges groups by themselves
JUDGED_AT_ONCE = 8  # groups whose predictions are in memory at a time
SHORT = 2  # all groups that remove at most so many layers are measured
EXACT_LIMIT, ROUGH_EXACT_LIMIT = 4096, 2048  # equations that are solved in float64 at most: of a fit, of a rough one
STEP_TOKENS = 2048  # of a step of a fused layer's training at least, of all processes together
EVALUATIONS = 2  # looks of a healing at held-out text, when it keeps its state; one more is before the first step
LOGITS = 1 << 24  # of a model that exist at a time, about: with a large vocabulary those of few tokens
TRAINED_LOGITS = 1 << 26  # the same in a step of healing, in the type of its computation
LOGITS_IN_CACHE = 1 << 18  # of those at a time in float32 on the CPU, about: of predictions, not of training
FLOAT_LOGITS, FLOAT_LOGITS_ON_CPU = 1 << 24, 1 << 17  # of those at a time in float32: on the CPU in its cache

# Regression compares the largest channels: 6144, or 1.25 times as many as are kept if that is more. Two float32 squares
# of them are in memory at a time: 2.6 GB for a width of 14336.
MAX_CANDIDATES = 6144
TOKEN_STRIDE = 4  # one token in so many decides which channels write most


def longest_group(layers: int, fusions: int) -> int:
    """How many layers become one at most, where some of so many go: `LONGEST_GROUP`, or more where they have to."""
    return max(min(fusions + 1, LONGEST_GROUP), least_longest(layers, fusions))


def least_longest(layers: int, fusions: int) -> int:
    """How many layers the longest group has at least, where some of so many layers go."""
    return -(-layers // (layers - fusions))


def most_fusions(layers: int, longest: int) -> int:
    """How many of so many layers can go where no group is longer."""
    return layers - -(-layers // longest)


def batch_size(length: int, channels: int, batch_bytes: int) -> int:
    """Sequences of so many tokens in a batch, for an MLP of so many channels: as many as its bytes hold.

    It has `PERPLEXITY_LENGTH` tokens at least, as products of fewer do not use a CPU well.
    """
    tokens = max(PERPLEXITY_LENGTH, batch_bytes // (BATCH_COPIES * channels))
    return max(1, tokens // length)


def num_rough_tokens(channels: int) -> int:
    """Calibration tokens that groups are fitted to roughly, to compare them, for an MLP of so many channels.

    Four for three channels rank sets no worse than twice as many do (research/layers.md).
    """
    return min(max(2048, 4 * channels // 3), 4096)


def num_trials(tokens: int) -> int:
    """How many sets of groups are tried out whole: one for 2048 of so many calibration tokens, from 6 to 16."""
    return min(16, max(6, tokens // 2048))


def judged_stride(vocab_size: int) -> int:
    """Of how many neighbouring tokens one is judged in choosing: their predictions say much the same.

    The larger the vocabulary, the fewer predictions are compared.
    """
    return min(max(2, vocab_size // 32768), 6)


def num_candidates(channels: int, keep: int) -> int:
    """How many MLP channels of a group are compared by regression, where `keep` of them are kept."""
    return min(channels, max(MAX_CANDIDATES, int(1.25 * keep)))


def num_passes(tokens: int) -> int:
    """How often a fused layer is trained on so many calibration tokens: 8 times, of more than 49152 fewer times."""
    return max(1, min(8, round(8 * 49152 / tokens)))


def solved_in_tokens(tokens: int, unknowns: int) -> bool:
    """Whether a rough fit is solved in its tokens; of more of them sums are as fast, in less memory."""
    return 2 * tokens <= unknowns
