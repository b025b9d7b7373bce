"""Fits of one layer to a group. That a layer and an idle one fuse to the layer is in families/test_fusions.py."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from builders import normal
from conftest import make_llama
from tiny_models import fitted, tiny_model
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.refit.bottom_up import fit_groups
from lf_hf.refit.regression import DualRegression, Regression, Solution, Solver
from lf_hf.refit.traces import run_group, trace
from lf_hf.refit.tuning import training_steps, tune

Problem = tuple[Tensor, Tensor, Tensor]
"""What is read (tokens, inputs), what is to be written (tokens, outputs), and the weights of tokens."""


def problem(seed: int = 0, tokens: int = 200, inputs: int = 8, outputs: int = 3, shared: float = 0.0) -> Problem:
    """Inputs of unlike sizes that have a direction in common, which dwarfs the others where `shared` is large."""
    x = normal(tokens, inputs // 4, seed=seed) @ normal(inputs // 4, inputs, seed=seed + 1)
    common = normal(tokens, 1, seed=seed + 3) * normal(inputs, seed=seed + 4)
    x = (x + normal(tokens, inputs, seed=seed + 2) + shared * common) * normal(inputs, seed=seed + 5).exp()
    y = x @ normal(inputs, outputs, seed=seed + 6) / inputs + normal(tokens, outputs, seed=seed + 7)
    return x, y, normal(tokens, seed=seed + 8).square() + 0.1


def regression(
    x: Tensor, y: Tensor, weights: Tensor, *, dual: bool = False, solver: Solver | None = None
) -> Regression | DualRegression:
    made: Regression | DualRegression = DualRegression(x.device, x.dtype, solver)
    if not dual:
        made = Regression(x.shape[1], y.shape[1], x.device, x.dtype, solver=solver)
    for part in torch.arange(len(x)).split(64):  # sequence by sequence
        made.add(x[part], y[part], weights[part])
    made.complete()
    return made


@pytest.mark.parametrize("inputs", [8, 200, 1100])
@pytest.mark.parametrize("strength", [1e-3, 0.3])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rough_tokens"), [(torch.float32, None), (torch.float64, None), (torch.float32, 200)]
)
def test_ridge_minimises_its_objective(
    inputs: int,
    strength: float,
    dual: bool,
    dtype: torch.dtype,
    rough_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against least squares on rows that write the penalty out; the error is that of the tokens.

    Rough fits solve large systems in float32, which are small here.
    """
    monkeypatch.setattr("lf_hf.refit.regression.ROUGH_EXACT_LIMIT", 7)
    x, y, weights = (part.to(dtype) for part in problem(inputs=inputs))
    start = (normal(3, inputs, seed=1) / inputs).to(dtype)
    penalty = strength * float((weights[:, None] * x**2).sum(0).mean())
    rows = np.concatenate([weights.sqrt()[:, None] * x, np.sqrt(penalty) * np.eye(inputs)])
    wanted = np.concatenate([weights.sqrt()[:, None] * y, np.sqrt(penalty) * start.T])
    expected = np.linalg.lstsq(rows.astype(np.float64), wanted.astype(np.float64), rcond=None)[0].T
    solution = regression(x, y, weights, dual=dual, solver=Solver(rough_tokens)).ridge(start, strength)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-4, atol=1e-4)
    for weight, error in ((start, solution.error_before), (torch.tensor(expected).to(dtype), solution.error_after)):
        missed = (weights[:, None] * (y - x @ weight.T) ** 2).double().sum() / (weights[:, None] * y**2).double().sum()
        assert error == pytest.approx(float(missed), rel=1e-3 if rough_tokens else 1e-4, abs=1e-6)


@pytest.mark.parametrize("strength", [1e-30, 1e-9, 1e-2, 1e9])
@pytest.mark.parametrize("kind", ["zero", "zero column", "equal columns", "few tokens", "nothing to write"])
@pytest.mark.parametrize("dual", [False, True])
def test_degenerate_fits_are_finite_or_one_error(kind: str, strength: float, dual: bool) -> None:
    x, y, weights = problem()
    if kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "zero column":
        x[:, 2] = 0
    elif kind == "equal columns":
        x[:] = x[:, :1]
    elif kind == "few tokens":
        x, y, weights = x[:3], y[:3], weights[:3]
    else:
        y = torch.zeros_like(y)
    made = regression(x, y, weights, dual=dual)
    try:
        fitted, before, after = made.ridge(torch.zeros(3, 8), strength)
        made.solver.check(made.solver.codes().tolist())
    except ValueError as error:
        message = str(error)
        assert strength < 1e-6 and "is not stable; give more text, or raise ridge" in message
    else:
        assert torch.isfinite(fitted).all() and -1e-4 < after < 1 + 1e-4
        assert before == pytest.approx(0 if kind == "nothing to write" else 1)
    kept = made.prune(torch.zeros(3, 8), 4)
    assert len(set(kept.tolist())) == 4


def eliminated(given: Problem, start: Tensor, keep: int, block: int, rounds: int) -> list[int]:
    """What is left where the loss of each block is computed by solving without it, all from the tokens."""
    x, y, weights = (part.double().numpy() for part in given)
    gram, ridge = (x.T * weights) @ x, 1e-2 * np.mean(weights @ x**2)
    target = (x.T * weights) @ y + ridge * start.double().numpy().T
    gram += ridge * np.eye(len(gram))

    def explained(blocks: list[int]) -> float:
        index = np.concatenate([np.arange(block * n, block * (n + 1)) for n in blocks])
        return float((target[index] * np.linalg.solve(gram[np.ix_(index, index)], target[index])).sum())

    left = list(range(x.shape[1] // block))
    surplus = len(left) - keep
    for step in range(rounds):
        worth = {n: -explained([other for other in left if other != n]) for n in left}
        size = keep + surplus * (rounds - 1 - step) // rounds
        left = sorted(sorted(left, key=lambda n: -worth[n])[:size])
    return left


@pytest.mark.parametrize(
    ("inputs", "block", "keep", "rounds"),
    [(24, 1, 10, 4), (24, 1, 5, 19), (48, 4, 5, 7), (48, 4, 3, 3), (60, 6, 9, 4), (40, 8, 5, 2), (12, 4, 3, 3)],
)
@pytest.mark.parametrize("way", ["in float64", "in float32", "dual", "dual, of fewer tokens than inputs"])
def test_what_is_left_is_what_elimination_from_scratch_leaves(
    inputs: int, block: int, keep: int, rounds: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "in float32":
        monkeypatch.setattr("lf_hf.refit.regression.EXACT_LIMIT", 0)
    tokens = inputs // 2 if way.endswith("inputs") else 300
    for seed in range(4):
        given, start = problem(seed, tokens, inputs, 5, shared=3.0), normal(5, inputs, seed=seed) / inputs
        kept = regression(*given, dual=way.startswith("dual")).prune(start, keep, block=block, rounds=rounds)
        assert kept.tolist() == eliminated(given, start, keep, block, rounds)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("dual", [False, True])
def test_large_problems_in_float32_or_in_tokens(block: int, dual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block a round, where nearly all of the inputs' energy is in one direction."""
    given, start = problem(0, 256 if dual else 1000, 512, 8, shared=1000.0), normal(8, 512) / 512
    total = 512 // block
    arguments = {"block": block, "rounds": total - total // 6}
    exact = regression(*given).prune(start, total // 6, **arguments)
    monkeypatch.setattr("lf_hf.refit.regression.EXACT_LIMIT", 0)
    assert torch.equal(regression(*given, dual=dual).prune(start, total // 6, **arguments), exact)


SEQUENCES = [torch.randint(1, 320, (64,), generator=torch.Generator().manual_seed(n)) for n in range(24)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_rough_fit_to_few_tokens_is_what_it_is_by_sums(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen tokens, in which input maps and what writes heads and channels are solved for."""
    decoder = Decoder(tiny_model(model_type))
    states = decoder.embed([SEQUENCES[0][None, :16]])
    streams = [state + 0.1 * normal(*state.shape) for state in states]
    few, _, _ = fitted(decoder, (1, 2), states, rough=True, streams=streams)
    monkeypatch.setattr("lf_hf.refit.half_fit.solved_in_tokens", lambda tokens, unknowns: False)
    by_sums, _, _ = fitted(decoder, (1, 2), states, rough=True, streams=streams)
    one, other = few.entry, by_sums.entry
    assert (one.heads_kept, one.channels_kept) == (other.heads_kept, other.channels_kept)
    errors = other.error_before, other.error_after, other.attention_error
    assert (one.error_before, one.error_after, one.attention_error) == pytest.approx(errors, rel=1e-3)
    torch.testing.assert_close(few.weights, by_sums.weights, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("power", [-20, 20])
@pytest.mark.parametrize(
    ("reader", "writer"), [("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")]
)
def test_layers_that_differ_in_scale_but_not_in_function_are_fitted_alike(
    reader: str, writer: str, power: int, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a share of the channels is compared by regression only."""
    monkeypatch.setattr("lf_hf.runtime.amounts.MAX_CANDIDATES", 0)
    found = []
    for scale in (1.0, 2.0**power):
        decoder = Decoder(make_llama())
        for layer in decoder.model.model.layers:
            layer.get_submodule(reader).weight.mul_(scale)
            layer.get_submodule(writer).weight.div_(scale)
        states = decoder.embed(decoder.make_batches(SEQUENCES[:12]))
        fit, fused, _ = fitted(decoder, (1, 2), states, rough=rough)
        found.append((decoder.run_layer(fused, states[0]), fit.weights[f"{writer}.weight"] * scale))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_token_without_an_embedding_does_not_spoil_the_fit() -> None:
    """As reserved tokens have none, which text that the model writes may start with."""
    decoder = Decoder(make_llama())
    decoder.model.model.embed_tokens.weight[SEQUENCES[0][0]] = 0
    states = decoder.embed(decoder.make_batches(SEQUENCES[:12]))
    fit, fused, _ = fitted(decoder, (1, 2), states)
    assert all(torch.isfinite(tensor).all() for tensor in (*fit.weights.values(), decoder.run_layer(fused, states[0])))


@torch.no_grad()
def test_a_fit_that_overflows_its_dtype_is_named() -> None:
    decoder = Decoder(make_llama(dtype=torch.float16))
    states = decoder.embed(decoder.make_batches(SEQUENCES[:12]))
    ridge = Regression.ridge

    def huge(problem: Regression, start: torch.Tensor | None, strength: float) -> Solution:
        solution = ridge(problem, start, strength)
        return solution._replace(weight=solution.weight * (1e9 if solution.weight.shape == (32, 48) else 1))

    with (
        mock.patch.object(Regression, "ridge", huge),
        pytest.raises(ValueError, match=r"mlp.down_proj.weight that was fitted overflows torch.float16"),
    ):
        fitted(decoder, (1, 2), states)
    for layer in decoder.model.model.layers:  # folded into each other they overflow
        layer.post_attention_layernorm.weight[0] = layer.mlp.up_proj.weight[:, 0] = 500
    with pytest.raises(ValueError, match="activations of a layer that is refitted overflow"):
        fitted(decoder, (1, 2), states)


@torch.no_grad()
def test_what_is_written_for_the_first_token_alone_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.runtime.amounts.MAX_CANDIDATES", 0)  # 1.25 times as many as are kept stand for election
    decoder = Decoder(make_llama())
    layer = decoder.model.model.layers[2]
    for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
        weight[7] = 0
        weight[7, 0] = 3
    states = [normal(1, 512, 32, seed=n) for n in range(8)]
    for state in states:
        state[..., 0] = -9  # the gate is shut
        state[0, 0] = 0
        state[0, 0, 0] = 99
    layer.post_attention_layernorm.weight[0] = 1
    layer.mlp.down_proj.weight[:, 7] = normal(32, seed=99) * 3
    layer.mlp.down_proj.weight[0, 7] = 0
    _, fused, traces = fitted(decoder, (1, 2), states)
    for state, output in zip(states, traces.output, strict=True):
        assert output[0, 0].norm() > 10 * output[0, 1:].norm(dim=-1).max()
        assert relative(decoder.run_layer(fused, state)[0, 0], output[0, 0]) < 0.2


@torch.no_grad()
def test_fits_from_the_bottom_are_aimed_at_the_dense_model() -> None:
    """So groups above make up for what groups below miss."""
    model, ids = make_llama(num_hidden_layers=6), torch.stack(SEQUENCES)
    dense = model.model(ids, output_hidden_states=True).hidden_states[5]
    groups, missed = [(1, 2), (3, 4)], []
    for at_a_time in (2, 1):
        decoder = Decoder(model).copy()
        for start in range(0, 2, at_a_time):
            some = groups[start : start + at_a_time]
            for fit in fit_groups(Decoder(model), some, SEQUENCES, [], ridge=0.01):
                first, last = fit.entry.layers
                decoder.join((first - first // 3, last - first // 3), fit.weights)
        assert decoder.num_layers == 4
        missed.append(relative(decoder.model.model(ids, output_hidden_states=True).hidden_states[3], dense))
    assert missed[0] < 0.95 * missed[1]


MANY_SEQUENCES = [torch.randint(0, 320, (48 + n % 3,), generator=torch.Generator().manual_seed(n)) for n in range(170)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "dtype"), [("llama", torch.float32), ("llama", torch.float16), ("gemma3_text", torch.bfloat16)]
)
def test_a_fit_is_nearer_to_its_group_than_its_layers_and_training_helps(model_type: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(model_type).to(dtype)
    decoder, layers = Decoder(model), model.model.layers[1:3]
    text, unseen_text = MANY_SEQUENCES[:150], MANY_SEQUENCES[150:]
    states, unseen = (decoder.embed(decoder.make_batches(sequences)) for sequences in (text, unseen_text))
    wanted = trace(decoder, layers, run_group(decoder, layers, unseen), None).output
    fit, fused, traces = fitted(decoder, (1, 2), states)
    entry: Any = fit.entry
    assert entry.layers == [1, 2] and sum(entry.channels_kept) == 48 and entry.error_after < entry.error_before

    def missed(layer: Any) -> float:
        found = [decoder.run_layer(layer, state) for state in unseen]
        return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, wanted, strict=True))

    _, rough, _ = fitted(decoder, (1, 2), states, rough=True)
    untrained = missed(fused)
    assert max(untrained, missed(rough)) < min(map(missed, layers))
    tuned = tune(decoder, fused, states, traces.output, training_steps(decoder, text))
    fused.load_state_dict(tuned)
    assert missed(fused) < 0.98 * untrained
    assert {weight.dtype for weight in tuned.values()} == {dtype}
