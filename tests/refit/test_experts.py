"""Fits of layers with experts to a group. A layer and an idle one fuse to it in families/test_fusions.py."""

from typing import Any

import pytest
import torch
from tiny_models import fitted, tiny_model
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.refit.layer_parts import mid_state

IDS = torch.randint(2, 320, (40, 24), generator=torch.Generator().manual_seed(0))
RIDGE = 0.1


def written_from(layer: Any, state: Tensor) -> list[Tensor]:
    """What each expert of a Qwen3-MoE reads with its down_proj, times its share: (tokens T, channels) each."""
    read = layer.post_attention_layernorm(state).flatten(0, 1)
    _, shares, chosen = layer.mlp.gate(read)
    experts = []
    for number, rows in enumerate(layer.mlp.experts.gate_up_proj):
        gate, up = (read @ rows.T).chunk(2, dim=1)
        share = (shares * (chosen == number)).sum(1)
        experts.append(torch.nn.functional.silu(gate) * up * share[:, None])
    return experts


@torch.no_grad()
def test_sweeps_find_what_solving_for_all_experts_at_once_does() -> None:
    """By the normal equations of all of them, with one penalty, from where the layer that is kept was."""
    decoder = Decoder(tiny_model("qwen3_moe"))
    decoder.layer(3).mlp.experts.gate_up_proj.zero_()  # so that none of its channels competes
    states = decoder.embed([IDS])
    fit, layer, traces = fitted(decoder, (2, 3), states, ridge=RIDGE)
    assert fit.entry.shares == [1, 0]
    start = torch.cat([*decoder.layer(2).mlp.experts.down_proj], dim=1).double()  # (hidden, all channels)
    mid = mid_state(decoder, layer, states[0])
    target = (traces.output[0] - mid).flatten(0, 1).double()
    weight = 1 / (traces.output[0].double().square().mean(-1) + decoder.config.rms_norm_eps).flatten()
    x = torch.cat(written_from(layer, mid), dim=1).double()
    gram = x.T @ (weight[:, None] * x)
    pull = RIDGE * gram.diagonal().mean()
    exact = torch.linalg.solve(
        gram + pull * torch.eye(len(gram)), (target.T @ (weight[:, None] * x) + pull * start).T
    ).T
    found = torch.cat([*layer.mlp.experts.down_proj], dim=1).double()

    def objective(down: Tensor) -> float:
        return float(weight @ (target - x @ down.T).square().sum(1) + pull * (down - start).square().sum())

    assert objective(exact) < objective(found) < objective(exact) + 0.02 * (objective(start) - objective(exact))
    assert fit.entry.error_after is not None and fit.entry.error_before is not None
    assert fit.entry.error_after < fit.entry.error_before


@pytest.mark.parametrize(
    ("given", "reached"),
    [({}, [0, 1]), ({}, range(7)), ({"num_experts_per_tok": 8}, range(8)), ({"num_local_experts": 1}, [0])],
    ids=["two of eight take all", "one is never taken", "all work on each token", "a single one"],
)
def test_routers_of_every_kind_are_fitted(given: dict[str, Any], reached: list[int]) -> None:
    """Experts that no token reaches stay as they were, and are counted."""
    if given.get("num_local_experts") == 1:
        given = given | {"num_experts_per_tok": 1}
    model = tiny_model("gpt_oss", **given)
    num_experts = model.config.num_local_experts
    for layer in model.model.layers:
        layer.mlp.router.bias.data = torch.tensor([1e4 * (number in reached) for number in range(num_experts)])
    decoder = Decoder(model)
    fit, layer, _ = fitted(decoder, (2, 3), decoder.embed([IDS]), ridge=RIDGE)
    after = layer.mlp.experts.down_proj
    pairs = [zip(decoder.layer(number).mlp.experts.down_proj, after, strict=True) for number in (2, 3)]
    changed = [{number for number, pair in enumerate(pairs_of) if not torch.equal(*pair)} for pairs_of in pairs]
    moved = min(changed, key=len)  # of the layer that is kept
    assert moved == {*reached} and fit.entry.experts_unreached == num_experts - len(moved)
    assert ("no text reached" in fit.entry.summary()) == (len(moved) < num_experts)
    assert fit.entry.error_after < fit.entry.error_before  # type: ignore[operator]


@torch.no_grad()
def test_channels_of_other_layers_take_the_places_of_those_that_write_nothing() -> None:
    """Where half of each layer's channels are dead, the other halves of two layers make one."""
    decoder = Decoder(tiny_model("qwen3_moe"))
    for number in (2, 3):
        for readers in decoder.layer(number).mlp.experts.gate_up_proj:
            for reader in readers.chunk(2):
                reader[::2] = 0
    fit, layer, _ = fitted(decoder, (2, 3), decoder.embed([IDS.repeat(4, 1)]), ridge=RIDGE)
    assert fit.entry.shares == pytest.approx([0.5, 0.5], abs=0.02)
    assert all(readers.abs().sum(1).all() for readers in layer.mlp.experts.gate_up_proj)
