from __future__ import annotations

import numpy as np
import torch
from conftest import make_llama

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.stages.activations import pairwise_distances, sample_distances

SAMPLES = [torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(length)) for length in (3, 9, 6)]


def test_distances_equal_those_of_explicitly_padded_states() -> None:
    states = [torch.randn(length, 7, generator=torch.Generator().manual_seed(length)) for length in (4, 1, 9, 9)]
    padded = np.zeros((4, 9, 7))
    for n, state in enumerate(states):
        padded[n, : len(state)] = state
    expected = [[np.linalg.norm(a - b) for b in padded] for a in padded]
    np.testing.assert_allclose(pairwise_distances(states), expected, rtol=1e-12)


def test_distances_survive_a_huge_shared_component() -> None:
    small = [torch.randn(5, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    shifted = [state + 4096 for state in small]  # as attention-sink tokens have
    exact = [state.double() - 4096 for state in shifted]
    expected = [[torch.linalg.norm(a - b).item() for b in exact] for a in exact]
    np.testing.assert_allclose(pairwise_distances(shifted), expected, rtol=1e-10)


def test_equal_samples_are_exactly_zero_apart() -> None:
    """Also where a matrix product of the samples would round alike terms differently."""
    states = [torch.randn(40, 33, generator=torch.Generator().manual_seed(n % 19)) for n in range(57)]
    distances = pairwise_distances(states)
    np.testing.assert_array_equal(distances == 0, np.arange(57)[:, None] % 19 == np.arange(57) % 19)


def test_sample_distances_has_one_matrix_a_layer_and_zero_between_equal_samples() -> None:
    distances = sample_distances(ModelDecoder(make_llama()), [*SAMPLES, SAMPLES[1]])
    assert distances.shape == (5, 4, 4) and distances.dtype == np.float64
    np.testing.assert_array_equal(distances, distances.swapaxes(1, 2))
    assert distances[:, 1, 3].max() < 1e-5 * distances[:, 0, 1].min()
