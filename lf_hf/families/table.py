"""The families of models that can be fused, as a table: `CONTRIBUTING.md` says how to add one."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.activations import ACT2FN

DecoderLayer: TypeAlias = Any
"""A decoder layer of one of the families, which have no class in common."""
Weights = Mapping[str, Tensor]
"""Of a layer, by the parameters' names inside it: those that the layer has, or those of `Family.unpacked`."""
Kind = Mapping[str, Any]
"""What a layer has of its own in the config: its entry of each of `Family.layer_lists`."""
_KINDS = {"weight": "", "bias": "_bias"}
"""What the names of experts' parameters end with in memory, by what they are."""
_LINEAR = "linear_attention"  # as configs name the layers that have Gated DeltaNet in place of attention


@dataclass(frozen=True)
class Experts:
    """Experts, of which a router lets a few work on each token, and what they are called in layers and configs."""

    module: str = "mlp.experts"
    router: str = "mlp.gate"
    count: str = "num_experts"  # key of how many there are
    chosen: str = "num_experts_per_tok"  # key of how many work on a token
    width: str = "moe_intermediate_size"  # key of an expert's channels
    shared: str = ""  # an MLP that works on all tokens, times the sigmoid of what `shared_gate` gives if there is one
    shared_gate: str = ""
    shared_width: str = ""  # key of its channels
    # Norms, where experts stand beside an MLP: in front of experts, behind them and behind the MLP; and what the router
    # multiplies by what it reads, before its projection.
    before: str = ""
    after: str = ""
    shared_after: str = ""
    router_gain: str = ""
    # Whether matrices are transposed in memory, gate's and up's rows take turns, and both are kept within a limit.
    is_turned: bool = False

    @property
    def readers(self) -> tuple[str, str]:
        return f"{self.module}.gate_proj", f"{self.module}.up_proj"

    @property
    def router_reader(self) -> str:
        """The projection of a router."""
        return f"{self.router}.proj" if self.router_gain else self.router

    @property
    def writer(self) -> str:
        return f"{self.module}.down_proj"


@dataclass(frozen=True)
class Half:
    """Attention or MLP of a decoder layer: what reads the residual stream, and what writes to it.

    `before` is the norm that `readers` read, and `after` the one that what `writer` writes goes through; None where the
    layers have no such norm. `packed` is the projection that has the rows of all readers, in order, where there is one.
    `inner` are the parameters in between that are neither projections nor norms of heads. Where an MLP has `experts`,
    their matrices are those of `readers` and `writer` that have one more dimension, the first. `of_heads` are other
    parameters with as much for each key head, and `joined` those with queries, keys and values one below the other;
    `head_gain` multiplies the channels of every head in front of the writer.
    """

    before: str | None
    readers: tuple[str, ...]
    writer: str
    after: str | None = None
    packed: str | None = None
    inner: tuple[str, ...] = ()
    of_heads: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    head_gain: str = ""
    experts: Experts | None = None

    @property
    def module(self) -> str:
        """Name of the half in its layer."""
        return self.writer.partition(".")[0]

    @property
    def norms(self) -> list[str]:
        of_experts = (self.experts.before, self.experts.after, self.experts.shared_after) if self.experts else ()
        return [norm for norm in (self.before, self.after, *of_experts) if norm]

    def gain(self, reader: str) -> str | None:
        """Name of what multiplies the normalised stream in front of a reader."""
        if self.experts and self.experts.before and not reader.startswith(f"{self.experts.shared}."):
            is_router = reader == self.experts.router_reader
            return self.experts.router_gain if is_router else f"{self.experts.before}.weight"
        return f"{self.before}.weight" if self.before else None

    @property
    def parameter_names(self) -> set[str]:
        """Names of all parameters that the half may have, but for norms of heads."""
        projections = [*self.readers, self.writer]
        if self.experts and self.experts.shared:
            projections.append(f"{self.experts.shared}.down_proj")
        names = {f"{name}.{kind}" for name in projections for kind in ("weight", "bias")}
        return names | {f"{norm}.weight" for norm in self.norms} | {*self.inner, *self.of_heads, self.head_gain} - {""}


attention_half = partial(
    Half,
    before="input_layernorm",
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    writer="self_attn.o_proj",
)
mlp_half = partial(
    Half, before="post_attention_layernorm", readers=("mlp.gate_proj", "mlp.up_proj"), writer="mlp.down_proj"
)
_DELTA_NET = Half(
    before="input_layernorm",
    readers=tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")),
    writer="linear_attn.out_proj",
    of_heads=tuple(f"linear_attn.{name}" for name in ("conv1d.weight", "A_log", "dt_bias")),
    joined=("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight"),
    head_gain="linear_attn.norm.weight",
)


def experts_half(experts: Experts, **norms: Any) -> Half:
    """The half of a layer that has experts in place of an MLP."""
    norms.setdefault("before", "post_attention_layernorm")
    readers = [experts.router_reader, *experts.readers]
    if experts.shared_gate:
        readers.append(experts.shared_gate)
    if experts.shared:
        readers += [f"{experts.shared}.gate_proj", f"{experts.shared}.up_proj"]
    return Half(readers=tuple(readers), writer=experts.writer, experts=experts, **norms)


PROJECTIONS = tuple(name for half in (attention_half(), mlp_half()) for name in (*half.readers, half.writer))
"""The matrices of a decoder layer with attention, of any family, by the names of `Family.unpacked`."""


class Axis(NamedTuple):
    """One axis of a layer's parameter, and the permutation that acts on it."""

    parameter: str
    dim: int
    permutation: str


@dataclass(frozen=True, eq=False)
class Family:
    """One family of decoder models: RMSNorm, grouped-query attention and an MLP on one residual stream.

    Keys are names in the config, and "" where it has no such entry.
    """

    model_type: str  # of its config
    title: str  # in prose and in the names of our classes, such as "Qwen3"
    rotary: str = ""  # after the title in the name of its rotary embedding
    attention: Half = field(default_factory=attention_half)
    mlp: Half = field(default_factory=mlp_half)
    delta_net: Half | None = None  # in the place of attention in layers of type "linear_attention"
    gain_offset: float = 0.0  # norms multiply by this plus their weight
    # Whether queries and keys have norms: of each head, with gains that all heads share, in front of rotary embeddings
    # ("each") or behind them ("turned"); or over all heads of a layer.
    head_norms: Literal["each", "turned", "all"] | None = None
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    # Keys of lists with an entry a layer, which layers of different kinds differ in; the first is `layer_types`.
    layer_lists: tuple[str, ...] = ()
    window: str = ""  # key of the sliding window that all layers have; where there are `layer_types`, these say which
    activation: str = "hidden_act"  # key of the MLP's, of what its first reader gives; other readers multiply that
    width: str = "intermediate_size"  # key of the MLP's channels
    scalar: str = ""  # buffer that a layer's output is multiplied by
    scaled_embedding: bool = False  # whether the embedding multiplies by the root of the width
    embedding_multiplier: str = ""  # key of what multiplies embeddings
    residual_multiplier: str = ""  # key of what multiplies all that is written to the stream
    logits_divisor: str = ""  # key of what logits are divided by
    logits_cap: str = ""  # key of what a tanh keeps logits within

    @property
    def config_class(self) -> Any:
        return CONFIG_MAPPING[self.model_type]

    @property
    def causal_lm(self) -> Any:
        return self._class(f"{self.title.removesuffix('Text')}ForCausalLM")

    @property
    def decoder_layer(self) -> Any:
        return self._class(f"{self.title}DecoderLayer")

    @property
    def rotary_embedding(self) -> Any:
        return self._class(f"{self.title}{self.rotary}RotaryEmbedding")

    @property
    def cache_argument(self) -> str:
        """Name of a layer's argument for the cache, which depends on the version of transformers."""
        names = inspect.signature(self.decoder_layer.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    @property
    def takes_shared_keys(self) -> bool:
        """Whether layers take what keys and values are shared by, though none shares any."""
        return "shared_kv_states" in inspect.signature(self.decoder_layer.forward).parameters

    @property
    def rotary_of_type(self) -> bool:
        """Whether layers of different `layer_types` have rotary embeddings of their own, in this transformers."""
        return "layer_type" in inspect.signature(self.rotary_embedding.forward).parameters

    @property
    def norms_of_heads(self) -> list[str]:
        return [self.query_norm, self.key_norm] if self.head_norms else []

    @property
    def norms(self) -> list[str]:
        """All norms of a layer."""
        return [*self.attention.norms, *self.mlp.norms, *self.norms_of_heads]

    @property
    def parameter_names(self) -> set[str]:
        """Names of all parameters that a layer may have, as `unpacked` gives them."""
        names = {f"{norm}.weight" for norm in self.norms_of_heads} | {*filter(None, [self.scalar])}
        return names.union(*(half.parameter_names for half in (self.attention, self.delta_net, self.mlp) if half))

    @property
    def symmetry(self) -> tuple[Axis, ...]:
        """The permutation symmetry of a layer. Axes that are not named here are the residual stream's.

        "mlp" is any permutation of the MLP's hidden neurons. "key_value" moves whole key-value heads, and "query" moves
        whole query heads: each with its key-value head, and in any order among those that share it. Channels inside a
        head stay where they are, since rotary embeddings tie each to its place. Of a hybrid's layers the mixers stay
        as they are, and so do experts.
        """
        axes = []
        halves: list[tuple[Half, tuple[str, ...]]] = []
        if self.mlp.experts is None:
            halves.append((self.mlp, ("mlp",) * len(self.mlp.readers)))
        if self.delta_net is None:
            halves.append((self.attention, ("query", "key_value", "key_value")))
        for half, moved in halves:
            for name, permutation in zip(half.readers, moved, strict=True):
                axes += [Axis(f"{name}.weight", 0, permutation), Axis(f"{name}.bias", 0, permutation)]
            axes.append(Axis(f"{half.writer}.weight", 1, moved[0]))
        if self.head_norms == "all":
            axes += [Axis(f"{self.query_norm}.weight", 0, "query"), Axis(f"{self.key_norm}.weight", 0, "key_value")]
        return tuple(axes)

    def unpacked(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """A layer's parameters by names that all families share, each projection by itself, and norms' gains as such.

        All that can be are views.
        """
        named: dict[str, Tensor] = dict(layer.named_parameters())
        if self.scalar:
            named[self.scalar] = layer.get_buffer(self.scalar)
        if self.mlp.experts:
            named = _unpacked_experts(self.mlp.experts, named)
        for half in (self.attention, self.mlp):
            for kind in ("weight", "bias"):
                if half.packed and (tensor := named.pop(f"{half.packed}.{kind}", None)) is not None:
                    first, others = named[f"{half.writer}.weight"].shape[1], len(half.readers) - 1
                    parts = tensor.split([first, *[(len(tensor) - first) // others] * others])  # queries may be more
                    named |= {f"{name}.{kind}": part for name, part in zip(half.readers, parts, strict=True)}
        if self.gain_offset:
            for norm in self.norms:
                if (gain := named.get(f"{norm}.weight")) is not None:
                    named[f"{norm}.weight"] = gain.to(torch.promote_types(gain.dtype, torch.float32)) + self.gain_offset
        return named

    def packed(self, weights: Weights) -> dict[str, Tensor]:
        """The inverse of `unpacked`, of all parameters or of some."""
        named = dict(weights)
        if self.gain_offset:
            dtype = next((tensor.dtype for name, tensor in named.items() if "_proj." in name), None)
            for norm in self.norms:
                if (gain := named.get(f"{norm}.weight")) is not None:
                    named[f"{norm}.weight"] = (gain - self.gain_offset).to(dtype or gain.dtype)
        for half in (self.attention, self.mlp):
            for kind in ("weight", "bias"):
                if half.packed and f"{half.readers[0]}.{kind}" in named:
                    named[f"{half.packed}.{kind}"] = torch.cat([named.pop(f"{name}.{kind}") for name in half.readers])
        return _packed_experts(self.mlp.experts, named) if self.mlp.experts else named

    def config_kinds(self, config: PretrainedConfig) -> list[Kind]:
        """The kinds of all layers, as the config has them."""
        numbers = range(config.num_hidden_layers)
        return [{name: getattr(config, name)[number] for name in self.layer_lists} for number in numbers]

    def layer_kind(self, layer: DecoderLayer) -> Kind:
        """The kind of a layer, wherever it is."""
        kind: dict[str, Any] = {}
        if self.delta_net and hasattr(layer, self.delta_net.module):
            kind["layer_types"] = _LINEAR
        elif "layer_types" in self.layer_lists:
            window = getattr(layer.self_attn, "sliding_window", None)
            is_sliding = getattr(layer.self_attn, "is_sliding", window is not None)
            kind["layer_types"] = "sliding_attention" if is_sliding else "full_attention"
        if "no_rope_layers" in self.layer_lists:
            kind["no_rope_layers"] = layer.self_attn.use_rope
        return kind

    def mixer(self, kind: Kind) -> Half:
        """The half of a layer of some kind that comes before its MLP: attention, or what is in its place."""
        return self.delta_net if self.delta_net and kind["layer_types"] == _LINEAR else self.attention

    def mlp_width(self, config: PretrainedConfig) -> int:
        """Channels of a layer's MLP that work on a token."""
        experts = self.mlp.experts
        if experts is None:
            return int(getattr(config, self.width))
        return int(getattr(config, experts.width) * getattr(config, experts.chosen)) + self.shared_width(config)

    def shared_width(self, config: PretrainedConfig) -> int:
        """Of these, those of the MLP beside experts."""
        return int(getattr(config, self.mlp.experts.shared_width, 0)) if self.mlp.experts else 0

    def activated(self, config: PretrainedConfig, first: Tensor, *others: Tensor) -> Tensor:
        """What an MLP's writer reads, from what its readers give: each (tokens T, channels)."""
        if self.mlp.experts and self.mlp.experts.is_turned:
            gate, up = first.clamp(max=config.swiglu_limit), others[0].clamp(-config.swiglu_limit, config.swiglu_limit)
            return (up + 1) * gate * torch.sigmoid(config.swiglu_alpha * gate)
        activated: Tensor = ACT2FN[getattr(config, self.activation)](first)
        return math.prod(others, start=activated)

    def writer_weight(self, layer: DecoderLayer) -> Tensor:
        """What a layer's MLP writes with: all matrices of a layer are of this type, where this is."""
        weight: Tensor = layer.get_parameter(self.mlp.writer if self.mlp.experts else f"{self.mlp.writer}.weight")
        return weight

    def layer_mixer(self, layer: DecoderLayer) -> Half:
        """The half of a layer that comes before its MLP."""
        return self.mixer(self.layer_kind(layer))

    def mixer_module(self, layer: DecoderLayer) -> Any:
        """That half's module in a layer."""
        return layer.get_submodule(self.layer_mixer(layer).module)

    def num_key_heads(self, config: PretrainedConfig, kind: Kind) -> int:
        """Heads of keys in a layer of some kind, each of which belongs to several of queries, or of values."""
        is_attention = self.mixer(kind) is self.attention
        return of_kind(config, kind).num_key_value_heads if is_attention else config.linear_num_key_heads

    def new_layer(self, config: PretrainedConfig, kind: Kind) -> DecoderLayer:
        """A decoder layer of some kind, without weights."""
        if kind:
            config = copy.copy(of_kind(config, kind))
            for name, value in kind.items():
                setattr(config, name, [value])
        with torch.device("meta"):
            return self.decoder_layer(config, layer_idx=0)

    def has_window(self, config: PretrainedConfig, layer: DecoderLayer) -> bool:
        """Whether a layer's tokens attend to some of those before them alone."""
        is_sliding = self.layer_kind(layer).get("layer_types") == "sliding_attention"
        return is_sliding or getattr(config, self.window, None) is not None

    def first_states(self, config: PretrainedConfig, embedded: Tensor, *, rows: bool = False) -> Tensor:
        """What the first layer reads, from what the embedding gives, or from plain rows of its table."""
        if rows and self.scaled_embedding:
            embedded = embedded * torch.tensor(config.hidden_size**0.5).to(embedded.dtype)
        factor = getattr(config, self.embedding_multiplier, None)
        return embedded if factor is None else embedded * factor

    def logits(self, config: PretrainedConfig, logits: Tensor) -> Tensor:
        """The model's logits from those of its head."""
        if self.logits_divisor:
            logits = logits / getattr(config, self.logits_divisor)
        cap = getattr(config, self.logits_cap, None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def scale(self, layer: DecoderLayer, device: torch.device) -> Tensor | float:
        """What all of the stream is multiplied by at the end of a layer, on the stream's device."""
        return layer.get_buffer(self.scalar).to(device) if self.scalar else 1.0

    def residual_factor(self, config: PretrainedConfig) -> float:
        """What all that is written to the residual stream is multiplied by."""
        return getattr(config, self.residual_multiplier, 1.0)

    def _class(self, name: str) -> Any:
        module = self.config_class.__module__.replace("configuration_", "modeling_")
        return getattr(importlib.import_module(module), name)


_GEMMA2 = Family(
    "gemma2",
    "Gemma2",
    attention=attention_half(after="post_attention_layernorm"),
    mlp=mlp_half(before="pre_feedforward_layernorm", after="post_feedforward_layernorm"),
    gain_offset=1.0,
    layer_lists=("layer_types",),
    activation="hidden_activation",
    scaled_embedding=True,
    logits_cap="final_logit_softcapping",
)
_GEMMA4 = replace(
    _GEMMA2, model_type="gemma4_text", title="Gemma4Text", head_norms="each", gain_offset=0.0, scalar="layer_scalar"
)
_BESIDE_MLP = Experts(
    module="experts",
    router="router",
    chosen="top_k_experts",
    shared="mlp",
    shared_width="intermediate_size",
    before="pre_feedforward_layernorm_2",
    after="post_feedforward_layernorm_2",
    shared_after="post_feedforward_layernorm_1",
    router_gain="router.scale",
)
GEMMA4_MIXTURE = replace(
    _GEMMA4,
    mlp=experts_half(
        _BESIDE_MLP,
        before="pre_feedforward_layernorm",
        after="post_feedforward_layernorm",
        inner=("router.scale", "router.per_expert_scale"),
    ),
)
"""The same type of model, where its config says that experts stand beside each MLP."""
_OLMO2 = Family(
    "olmo2",
    "Olmo2",
    attention=attention_half(before=None, after="post_attention_layernorm"),
    mlp=mlp_half(before=None, after="post_feedforward_layernorm"),
    head_norms="all",
)
_QWEN3 = Family("qwen3", "Qwen3", head_norms="each", layer_lists=("layer_types",))
_QWEN3_5 = replace(
    _QWEN3, model_type="qwen3_5_text", title="Qwen3_5", rotary="Text", delta_net=_DELTA_NET, gain_offset=1.0
)
_GRANITE = Family(
    "granite",
    "Granite",
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    logits_divisor="logits_scaling",
)
_SHARED = Experts(
    shared="mlp.shared_expert",
    shared_gate="mlp.shared_expert_gate",
    shared_width="shared_expert_intermediate_size",
)
_ALL = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral", window="sliding_window"),
    Family("qwen2", "Qwen2", layer_lists=("layer_types",)),
    _QWEN3,
    Family(
        "phi3",
        "Phi3",
        attention=attention_half(packed="self_attn.qkv_proj"),
        mlp=mlp_half(packed="mlp.gate_up_proj"),
        window="sliding_window",
    ),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text", title="Gemma3", head_norms="each"),
    _GEMMA4,
    replace(_GEMMA4, model_type="gemma4_unified_text", title="Gemma4UnifiedText"),
    _OLMO2,
    _GRANITE,
    Family("smollm3", "SmolLM3", layer_lists=("layer_types", "no_rope_layers")),
    Family("qwen3_vl_text", "Qwen3VLText", head_norms="each"),
    Family("cwm", "Cwm", layer_lists=("layer_types",)),
    Family("ernie4_5", "Ernie4_5"),
    Family("arcee", "Arcee", mlp=mlp_half(readers=("mlp.up_proj",))),
    replace(_OLMO2, model_type="exaone4", title="Exaone4", head_norms="each", layer_lists=("layer_types",)),
    Family("gemma", "Gemma", gain_offset=1.0, scaled_embedding=True),
    Family(
        "glm4",
        "Glm4",
        attention=attention_half(after="post_self_attn_layernorm"),
        mlp=mlp_half(after="post_mlp_layernorm", packed="mlp.gate_up_proj"),
    ),
    Family(
        "hunyuan_v1_dense",
        "HunYuanDenseV1",
        head_norms="turned",
        query_norm="self_attn.query_layernorm",
        key_norm="self_attn.key_layernorm",
    ),
    Family("ministral", "Ministral", layer_lists=("layer_types",)),
    Family("ministral3", "Ministral3", window="sliding_window"),
    replace(_OLMO2, model_type="olmo3", title="Olmo3", layer_lists=("layer_types",)),
    Family("seed_oss", "SeedOss"),
    replace(
        _QWEN3,
        model_type="qwen3_moe",
        title="Qwen3Moe",
        mlp=experts_half(Experts()),
        layer_lists=(),
        window="sliding_window",
    ),
    Family("qwen2_moe", "Qwen2Moe", mlp=experts_half(_SHARED), layer_lists=("layer_types",)),
    Family("olmoe", "Olmoe", mlp=experts_half(Experts(width="intermediate_size")), head_norms="all"),
    Family(
        "mixtral",
        "Mixtral",
        mlp=experts_half(Experts(count="num_local_experts", width="intermediate_size")),
        window="sliding_window",
    ),
    replace(
        _GRANITE,
        model_type="granitemoe",
        title="GraniteMoe",
        mlp=experts_half(
            Experts(
                module="block_sparse_moe.experts",
                router="block_sparse_moe.router",
                count="num_local_experts",
                width="intermediate_size",
            )
        ),
    ),
    Family(
        "gpt_oss",
        "GptOss",
        attention=attention_half(of_heads=("self_attn.sinks",)),
        mlp=experts_half(
            Experts(router="mlp.router", count="num_local_experts", width="intermediate_size", is_turned=True)
        ),
        layer_lists=("layer_types",),
    ),
    _QWEN3_5,
    replace(_QWEN3_5, model_type="qwen3_5_moe_text", title="Qwen3_5Moe", mlp=experts_half(_SHARED)),
)
FAMILIES = MappingProxyType({family.model_type: family for family in _ALL})
"""All families by `model_type`."""


def _unpacked_experts(experts: Experts, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's parameters with each projection of its experts by itself, as (experts, outputs, inputs) and biases as
    (experts, outputs); all are views."""
    named, readers = dict(named), f"{experts.module}.gate_up_proj"
    for kind, suffix in _KINDS.items():
        both, down = (named.pop(f"{name}{suffix}", None) for name in (readers, experts.writer))
        if both is None or down is None:
            continue
        if experts.is_turned and kind == "weight":
            both, down = both.mT, down.mT
        parts = (both[:, ::2], both[:, 1::2]) if experts.is_turned else both.chunk(2, dim=1)
        named |= {f"{name}.{kind}": part for name, part in zip(experts.readers, parts, strict=True)}
        named[f"{experts.writer}.{kind}"] = down
    return named


def _packed_experts(experts: Experts, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_unpacked_experts`."""
    for kind, suffix in _KINDS.items():
        if f"{experts.writer}.{kind}" not in named:
            continue
        gate, up, down = (named.pop(f"{name}.{kind}") for name in (*experts.readers, experts.writer))
        both = torch.stack([gate, up], dim=2).flatten(1, 2) if experts.is_turned else torch.cat([gate, up], dim=1)
        if experts.is_turned and kind == "weight":
            both, down = both.mT, down.mT
        named[f"{experts.module}.gate_up_proj{suffix}"] = both
        named[f"{experts.writer}{suffix}"] = down
    return named


def of_kind(config: PretrainedConfig, kind: Kind) -> PretrainedConfig:
    """A config as it is for layers of some kind, where heads of another kind differ in size and number."""
    is_the_same = not getattr(config, "is_heterogeneous", False)  # which older versions of transformers have not
    of_type: PretrainedConfig = config if is_the_same else config.per_layer_config[kind["layer_types"]]
    return of_type


def head_dim(config: PretrainedConfig, kind: Kind) -> int:
    """Channels of an attention head in layers of some kind."""
    config = of_kind(config, kind)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
