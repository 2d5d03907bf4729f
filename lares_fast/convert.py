"""Convert checkpoints of the official code (BishopLiu/LARES): parameter names both ways, and the configuration."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lares_fast._errors import InputError
from lares_fast.config import LARESConfig
from lares_fast.reference.backbone import BACKBONES

_LAYER = {
    "attention.query": "multi_head_attention.query",
    "attention.key": "multi_head_attention.key",
    "attention.value": "multi_head_attention.value",
    "attention.output": "multi_head_attention.dense",
    "attention.norm": "multi_head_attention.LayerNorm",
    "feed_forward.up": "feed_forward.dense_1",
    "feed_forward.down": "feed_forward.dense_2",
    "feed_forward.norm": "feed_forward.LayerNorm",
}
_TOP = {
    "item_embedding": "item_embedding",
    "position_embedding": "position_embedding",
    "input_norm": "layernorm_1",
    "recurrence.norm": "layernorm_2",
    "recurrence.adapter.linear": "adapter",
}
_BLOCK = {"pre_block": "pre_encoder", "recurrence.core": "core_encoder"}
_GATE, _OFFICIAL_GATE = "recurrence.adapter.gate", "adapter"

_SETTINGS = {
    "n_items": "n_items",
    "max_len": "MAX_ITEM_LIST_LENGTH",
    "hidden_size": "hidden_size",
    "n_heads": "n_heads",
    "inner_size": "inner_size",
    "n_pre_layers": "n_pre_layers",
    "n_core_layers": "n_core_layers",
    "adapter": "adapter_type",
    "dropout": "hidden_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "mean_depth": "mean_recurrence",
    "depth_sampling": "sampling_scheme",
    "state_init": "state_init_method",
    "state_std": "state_std",
    "state_scale": "state_scale",
    "similarity": "sem_func",
    "tau": "tau",
}
# The depth at evaluation is optional in both configurations. The setting of attention dropout is left out, because the official
# code ignores it.
_OPTIONAL_SETTINGS = {"eval_depth": "test_recurrence"}


# A part of the parameter names that only the official layers of this backbone have. The official configuration does not name
# the backbone.
_BACKBONE_MARKS = {
    "transformer": ".multi_head_attention.",
    "fmlp": ".filterlayer.complex_weight",
    "bsarec": ".filter_layer.sqrt_beta",
}


def config_from_official(values: dict[str, Any], state_dict: dict[str, Tensor]) -> LARESConfig:
    """Return the :class:`LARESConfig` of an official configuration and the official parameters.

    ``values`` has the official keys, and its ``n_items`` counts the PAD row. The parameter names show the backbone. Raises
    :class:`InputError` for a missing key, an activation other than gelu, or a backbone that is not registered.
    """
    if missing := sorted(official for official in _SETTINGS.values() if official not in values):
        raise InputError(f"the official configuration lacks {', '.join(missing)}.")
    if (activation := values.get("hidden_act", "gelu")) != "gelu":
        raise InputError(f"hidden_act must be gelu, but the official configuration has {activation!r}.")
    settings = {ours: values[official] for ours, official in _SETTINGS.items()}
    settings |= {ours: values[official] for ours, official in _OPTIONAL_SETTINGS.items() if official in values}
    return LARESConfig(**settings, backbone=_backbone(state_dict))


def _backbone(state_dict: dict[str, Tensor]) -> str:
    for backbone, mark in _BACKBONE_MARKS.items():
        if any(mark in name for name in state_dict):
            if backbone not in BACKBONES:
                raise InputError(f"the backbone {backbone!r} is not supported; it must be one of {', '.join(BACKBONES)}.")
            return backbone
    raise InputError("the official state_dict has no layer of a known backbone: check that it is a LARES checkpoint.")


def from_official(state_dict: dict[str, Tensor], config: LARESConfig) -> dict[str, Tensor]:
    """Return the official ``state_dict`` with the parameter names of this package, for ``LARES(config).load_state_dict``.

    Raises :class:`InputError` if an entry is missing or unknown.
    """
    return _rename(state_dict, {official: ours for ours, official in _names(config).items()}, "official")


def to_official(state_dict: dict[str, Tensor], config: LARESConfig) -> dict[str, Tensor]:
    """Return a ``state_dict`` of this package with the official parameter names: the inverse of :func:`from_official`.

    Raises :class:`InputError` if an entry is missing or unknown.
    """
    return _rename(state_dict, _names(config), "lares_fast")


def _names(config: LARESConfig) -> dict[str, str]:
    """Return a dict from our name to the official name, for every parameter of a model with ``config``."""
    modules = {ours: official for ours, official in _TOP.items() if config.adapter == "concat" or official != "adapter"}
    for (ours, official), n_layers in zip(_BLOCK.items(), (config.n_pre_layers, config.n_core_layers), strict=True):
        for layer in range(n_layers):
            modules |= {f"{ours}.layers.{layer}.{a}": f"{official}.layer.{layer}.{b}" for a, b in _LAYER.items()}
    names = {}
    for ours, official in modules.items():
        for leaf in ("weight",) if ours.endswith("embedding") else ("weight", "bias"):
            names[f"{ours}.{leaf}"] = f"{official}.{leaf}"
    if config.adapter == "linear":
        names[_GATE] = _OFFICIAL_GATE
    return names


def _rename(state_dict: dict[str, Tensor], names: dict[str, str], origin: str) -> dict[str, Tensor]:
    missing, unknown = sorted(set(names) - set(state_dict)), sorted(set(state_dict) - set(names))
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"has the unknown entry {unknown[0]}"
        raise InputError(f"the {origin} state_dict {problem}: check that config describes the same model.")
    return {names[name]: value for name, value in state_dict.items()}
