"""The shape of a model in numbers, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lf_hf.families.models import family_of, free_layers, text_model
from lf_hf.families.table import head_dim, of_kind


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its space and time follow from; `size` is of a stored number, in bytes."""

    layers: int
    inner: int  # of these, those that groups by cost may have
    hidden: int
    mlp: int  # channels that work on a token
    readers: int  # matrices that an MLP reads the stream with; their products are what it writes with one more
    queries: int  # rows of q_proj
    keys: int  # of k_proj, and of v_proj
    heads: int  # of queries
    positions: int  # tokens that it takes
    vocab: int
    layer: int  # parameters of a layer
    active: int  # of these, those that work on a token
    experts: int  # of a layer, 0 where it has an MLP
    chosen: int  # of these, those that work on a token
    shared: int  # channels of an MLP beside experts
    total: int  # of the model, tied ones once
    size: int
    has_norm_after: bool  # whether halves write through a norm, and so are fitted twice
    has_head_norms: bool
    delta: int  # bytes that a hybrid's layer without attention keeps of a token for its gradient

    @classmethod
    def of(cls, model: Any, size: int) -> Shape:
        """Of a model, which may be on the meta device."""
        text, family = model.config.get_text_config(), family_of(model.config)
        layers = text_model(model).layers
        kinds = family.config_kinds(text)
        layer, experts = _count(layers) // len(layers), family.mlp.experts
        count, chosen = (getattr(text, key) for key in (experts.count, experts.chosen)) if experts else (0, 0)
        of_experts = 3 * text.hidden_size * (family.mlp_width(text) - family.shared_width(text)) // max(1, chosen)
        return cls(
            layers=len(layers),
            inner=len(free_layers(model.config, "groups")[0]),
            hidden=text.hidden_size,
            mlp=family.mlp_width(text),
            readers=2 if experts else len(family.mlp.readers),
            queries=text.num_attention_heads * max(head_dim(text, kind) for kind in kinds),
            keys=max(of_kind(text, kind).num_key_value_heads * head_dim(text, kind) for kind in kinds),
            heads=text.num_attention_heads,
            positions=text.max_position_embeddings,
            vocab=text.vocab_size,
            layer=layer,
            active=layer - (count - chosen) * of_experts,
            experts=count,
            chosen=chosen,
            shared=family.shared_width(text),
            total=_count(model),
            size=size,
            has_norm_after=family.mlp.after is not None,
            has_head_norms=family.head_norms is not None,
            delta=_delta_bytes(text) if family.delta_net else 0,
        )

    @property
    def layer_bytes(self) -> int:
        return self.layer * self.size

    @property
    def bytes(self) -> int:
        return self.total * self.size

    @property
    def head(self) -> int:
        """Parameters of the head, or of the embeddings."""
        return self.vocab * self.hidden

    @property
    def adapters(self) -> int:
        """Parameters of a LoRA of rank 1 on all projections of a layer but for those of experts."""
        channels = self.shared if self.experts else self.mlp
        of_mlp = (self.readers + 1) * (self.hidden + channels) if channels else 0
        return 4 * self.hidden + 2 * self.queries + 2 * self.keys + of_mlp

    @property
    def expert_width(self) -> int:
        """Channels of an expert."""
        return (self.mlp - self.shared) // max(1, self.chosen)


def _delta_bytes(text: Any) -> int:
    """Of Gated DeltaNet as torch computes it: all in float32, in chunks of 64 tokens, with a state for each of them."""
    keys, values, chunk = text.linear_key_head_dim, text.linear_value_head_dim, 64
    a_head = 10 * keys + 5 * values + 5 * chunk + 2 * keys * values // chunk
    return int(4 * text.linear_num_value_heads * a_head)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
