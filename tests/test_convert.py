"""Official checkpoints: an error says why one cannot be converted."""

import pytest
import torch

from lares_fast import LARES, LARESConfig, convert
from lares_fast._errors import InputError

CONFIG = LARESConfig.preset("tiny", n_items=9)
OFFICIAL = convert.to_official(LARES(CONFIG).state_dict(), CONFIG)
SETTINGS = {
    "n_items": 9, "MAX_ITEM_LIST_LENGTH": 10, "hidden_size": 16, "n_heads": 2, "inner_size": 32, "n_pre_layers": 1,
    "n_core_layers": 1, "adapter_type": "add", "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
    "mean_recurrence": 2, "sampling_scheme": "poisson-lognormal", "state_init_method": "normal", "state_std": 1.0,
    "state_scale": 3.0, "sem_func": "dot", "tau": 1.0, "hidden_act": "gelu",
}  # fmt: skip


def test_configuration():
    assert convert.config_from_official(SETTINGS, OFFICIAL) == CONFIG
    assert convert.config_from_official({**SETTINGS, "test_recurrence": 5}, OFFICIAL).steps == 5


@pytest.mark.parametrize(("settings", "weights", "message"), [
    ({k: v for k, v in SETTINGS.items() if k != "tau"}, OFFICIAL, "lacks tau"),
    ({**SETTINGS, "hidden_act": "relu"}, OFFICIAL, "hidden_act must be gelu"),
    (SETTINGS, {"pre_encoder.layer.0.filterlayer.complex_weight": torch.ones(1)}, "backbone 'fmlp' is not supported"),
    (SETTINGS, {"pre_encoder.blocks.0.layer.filter_layer.sqrt_beta": torch.ones(1)}, "backbone 'bsarec' is not supported"),
    (SETTINGS, {"weight": torch.ones(1)}, "no layer of a known backbone"),
])  # fmt: skip
def test_bad_configuration(settings, weights, message):
    with pytest.raises(InputError, match=message):
        convert.config_from_official(settings, weights)


def test_missing_and_unknown_entries():
    missing = {name: value for name, value in OFFICIAL.items() if name != "layernorm_1.bias"}
    with pytest.raises(InputError, match=r"the official state_dict lacks layernorm_1\.bias"):
        convert.from_official(missing, CONFIG)
    with pytest.raises(InputError, match="has the unknown entry extra"):
        convert.from_official({**OFFICIAL, "extra": torch.ones(1)}, CONFIG)
    with pytest.raises(InputError, match=r"lacks adapter\.bias"):
        convert.from_official(OFFICIAL, CONFIG.replace(adapter="concat"))
