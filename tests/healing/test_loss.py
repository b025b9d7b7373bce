"""The loss of a distillation: what it is, and its gradient."""

from __future__ import annotations

import pytest
import torch
from builders import normal
from torch.nn.functional import cross_entropy, kl_div

from lf_hf.healing import loss as module
from lf_hf.healing.loss import Loss, Targets, distillation_loss

SEQUENCES, TOKENS, HIDDEN, VOCAB = 2, 7, 5, 11
IDS = torch.randint(VOCAB, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
OF_BASE = normal(SEQUENCES, TOKENS, HIDDEN, seed=3), normal(VOCAB, HIDDEN, seed=4)
LOGITS = OF_BASE[0] @ OF_BASE[1].T


def student() -> tuple[torch.Tensor, torch.Tensor]:
    """Last states and the head."""
    states, weight = normal(SEQUENCES, TOKENS, HIDDEN, seed=1), normal(VOCAB, HIDDEN, seed=2)
    return states.requires_grad_(), weight.requires_grad_()


@pytest.fixture(autouse=True)
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 5 * VOCAB)
    monkeypatch.setattr(module, "FLOAT_LOGITS_ON_CPU", 2 * VOCAB)


@pytest.mark.parametrize(("temperature", "share", "softcap"), [(1.0, 0.0, None), (1.0, 0.3, 3.0), (2.5, 0.3, None)])
def test_it_is_divergence_and_the_next_token_s_loss(temperature: float, share: float, softcap: float | None) -> None:
    states, weight = student()
    to_logits = module.unchanged if softcap is None else lambda logits: softcap * torch.tanh(logits / softcap)
    logits = to_logits(states @ weight.T).flatten(0, 1).double()
    of_base = LOGITS.flatten(0, 1).double()
    found_log, wanted_log = ((each / temperature).log_softmax(-1) for each in (logits, of_base))
    divergence = kl_div(found_log, wanted_log, log_target=True, reduction="batchmean") * temperature**2
    following = logits.view(SEQUENCES, TOKENS, VOCAB)[:, :-1].flatten(0, 1)
    wanted = (1 - share) * divergence + share * cross_entropy(following, IDS[:, 1:].flatten())
    expected = torch.autograd.grad(3 * wanted, [states, weight])
    found = distillation_loss(states, weight, IDS, Targets(*OF_BASE), Loss(temperature, share), to_logits)
    torch.testing.assert_close(found, wanted.float())
    torch.testing.assert_close(torch.autograd.grad(3 * found, [states, weight]), expected)


def test_small_gradients_do_not_vanish_in_float16() -> None:
    """They are made before a scaler can scale them."""
    states, weight = normal(1, 512, HIDDEN, seed=1).requires_grad_(), normal(4096, HIDDEN, seed=2).requires_grad_()
    targets = Targets(normal(1, 512, HIDDEN, seed=3), normal(4096, HIDDEN, seed=4))
    gradients = []
    for half in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = distillation_loss(states, weight, torch.zeros(1, 512, dtype=torch.int64), targets, Loss())
        gradients.append(torch.autograd.grad(loss, [states, weight]))
    torch.testing.assert_close(*gradients)
