"""nn.MultiheadAttention as a whole, in peft's manner: its input projections and, inside, its output projection."""
from __future__ import annotations

from torch import nn

from .peft_layer import TuckerLinear
from .peft_parameters import TuckerParameters
from .targets import weights_of


class TuckerAttention(TuckerParameters):
    """An nn.MultiheadAttention; `tucker_parts[adapter]` has the factors of `in_proj_weight`, or of the projections of
    query, key and value where they differ in size. `out_proj` is a layer of its own, with the same adapters."""

    def update_layer(self, adapter_name: str, config, key: str) -> None:
        super().update_layer(adapter_name, config, key, list(weights_of(self.base_layer)))
        inner, key = self.base_layer.out_proj, f"{key}.out_proj"
        if isinstance(inner, TuckerLinear):
            inner.update_layer(adapter_name, config, key)
        else:
            self.base_layer.out_proj = TuckerLinear(inner, adapter_name, config, key)

    # What a parent reads of it beside the parameters, nn.TransformerEncoderLayer say
    out_proj = property(lambda self: self.base_layer.out_proj)
    _qkv_same_embed_dim = property(lambda self: self.base_layer._qkv_same_embed_dim)
    in_features = property(lambda self: self.base_layer.embed_dim)
    out_features = property(lambda self: 3 * self.base_layer.embed_dim)

    def merge_masks(self, *args, **kwargs):
        return self.base_layer.merge_masks(*args, **kwargs)


def has_adapted_output(module: nn.Module) -> bool:
    """Has the output projection an adapter already, without the attention around it?"""
    return isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, TuckerLinear)
