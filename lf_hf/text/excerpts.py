"""Even excerpts of what may be too much for memory: one pass, and at most twice what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def spread_evenly(items: Iterable[str], count: int) -> tuple[list[str], int]:
    """At most `count` of the items, spread evenly over all of them, and how many items there are."""
    kept: list[str] = []
    stride, total = 1, 0
    for item in items:
        if total % stride == 0:
            kept.append(item)
        total += 1
        if len(kept) == 2 * count:
            kept = kept[::2]
            stride *= 2
    if len(kept) > count:
        kept = [kept[n * len(kept) // count] for n in range(count)]
    return kept, total


def windows(texts: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of `size` characters of all of some texts, which end with a newline; an empty line is between two of them.

    The last piece may be shorter.
    """
    rest, between = "", ""
    for text in texts:
        rest += between + text
        between = "\n"
        for start in range(0, len(rest) - size + 1, size):
            yield rest[start : start + size]
        rest = rest[len(rest) // size * size :]
    if rest:
        yield rest
