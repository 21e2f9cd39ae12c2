"""Layers and models for peft's method `tucker`, and the composed weight in float64."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from torch_subspace.peft import TuckerLayer  # noqa: E402

quiet = pytest.mark.filterwarnings(
    "ignore:.*save_embedding_layers", "ignore:.*second time", "ignore:.*renamed from", "ignore:Already found a",
    "ignore:.*multiple adapters", "ignore:.*find a config file", "ignore:.*not active")


class OwnForward(nn.Conv2d):
    """A layer that computes with its weight in its own way, as weight standardisation does."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def conv1d(n_out, n_in):
    return transformers.pytorch_utils.Conv1D(n_out, n_in)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 4, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
    "Conv1D": (lambda: conv1d(5, 7), (3, 4, 7)),
    "embedding": (lambda: nn.Embedding(11, 5, padding_idx=2), None),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 7, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d same reflect": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d replicate": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="replicate"), (2, 4, 7, 8)),
    "conv2d dilated strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 9, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 8)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 2, 3, 4, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 7)),
    "conv_transpose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 6)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (1, 2, 3, 4, 3)),
    "own forward": (lambda: OwnForward(4, 6, 3, padding=1), (2, 4, 7, 8)),
}


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(1, 2)

    def forward(self, x):
        return self.layer(x)


def holder(kind, dtype=torch.float32):
    torch.manual_seed(0)
    make, size = LAYERS[kind]
    model = Holder(make()).to(dtype)
    if hasattr(model.layer, "nf"):
        nn.init.normal_(model.layer.weight)
    x = torch.randint(11, (3, 4)) if size is None else torch.randn(size, dtype=dtype)
    return model, x


def stir(model, name="default", size=0.3):
    """Give the adapter numbers as if it had been trained."""
    g = torch.Generator().manual_seed(len(name))
    for m in model.modules():
        if isinstance(m, TuckerLayer) and name in m.tucker_parts:
            for p in m.tucker_parts[name].parameters():
                p.data.copy_(size * torch.randn(p.shape, generator=g))
            if getattr(m.base_layer, "padding_idx", None) is not None:
                m.tucker_parts[name].factor0.data[m.base_layer.padding_idx] = 0
    return model


def composed(layer, names=("default",)):
    """The weight with the adapters' change, in float64 and by the definition."""
    w = layer.base_layer.weight.double()
    for name in names:
        part = layer.tucker_parts[name]
        change = part.core.double()
        for mode, factor in enumerate(part.factors):
            if factor is not None:
                change = torch.tensordot(factor.double(), change, dims=([1], [mode])).movedim(0, mode)
        w = w + layer.scaling[name] * change
    return w.detach()


def reference(layer, x, names=("default",)):
    plain = copy.deepcopy(layer.base_layer).double()
    plain.weight.data = composed(layer, names)
    with torch.no_grad():
        return plain(x if x.dtype == torch.int64 else x.double())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.up = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 8), conv1d(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, i):
        x = self.up(self.lin(self.emb(i)).relu()).mT
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.mean(-1)))


def net():
    torch.manual_seed(0)
    return Net(), torch.randint(11, (4, 7))


ALL = ["all-linear", "all-conv", "emb"]
