"""The layer kinds that take an adapter, each in a box with inputs to run it on, and an adapter's change by hand."""

import warnings

import torch
import torch.nn.functional as F
from helpers import optional
from safetensors import safe_open
from torch import nn

import torch_subspace as ts


class Box(nn.Module):
    """A model around one layer; of a tuple it hands out the first."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs, **more):
        y = self.layer(*inputs, **more)
        return y[0] if isinstance(y, tuple) else y


class OwnLinear(nn.Linear):
    """A linear layer with a forward of its own, which adapters must not replace."""

    def forward(self, x):
        return F.linear(x, self.weight.tanh(), self.bias) * 2


def conv(d, *args, size=7, **kwargs):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1](*args, **kwargs)
    return layer, (torch.randn(2, args[0], *[size] * d),), {}


def transposed(d, *args, size=4, more=None, **kwargs):
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1](*args, **kwargs)
    return layer, (torch.randn(2, args[0], *[size] * d),), more or {}


def attention(kdim=None, vdim=None, **kwargs):
    layer = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, **kwargs)
    return layer, (torch.randn(3, 4, 8), torch.randn(3, 4, kdim or 8), torch.randn(3, 4, vdim or 8)), {}


def encoder_layer(**kwargs):
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **kwargs), (torch.randn(2, 5, 8),), {}


def conv1d_of_transformers():
    layer = optional("transformers.pytorch_utils").Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer, (torch.randn(2, 3, 6),), {}


def of_timm(name, *args, **kwargs):
    layers = optional("timm.layers")
    return getattr(layers, name)(*args, **kwargs), (torch.randn(2, 4, 7, 7),), {}


def swin(version):
    models = optional("torchvision.models.swin_transformer")
    kind = models.ShiftedWindowAttention if version == 1 else models.ShiftedWindowAttentionV2
    return kind(8, [2, 2], [1, 1], 2), (torch.randn(1, 4, 4, 8),), {}


KINDS = {
    "linear": lambda: (nn.Linear(6, 5), (torch.randn(2, 3, 6),), {}),
    "linear_vector": lambda: (nn.Linear(6, 5, bias=False), (torch.randn(6),), {}),
    "linear_own_forward": lambda: (OwnLinear(6, 5), (torch.randn(4, 6),), {}),
    "embedding": lambda: (nn.Embedding(9, 6), (torch.randint(9, (2, 5)),), {}),
    "embedding_padding": lambda: (nn.Embedding(9, 6, padding_idx=2), (torch.tensor([[0, 2, 2], [8, 2, 1]]),), {}),
    "embedding_by_frequency": lambda: (nn.Embedding(9, 6, scale_grad_by_freq=True), (torch.tensor([1, 1, 4]),), {}),
    "conv1d": lambda: conv(1, 4, 6, 3, padding=1),
    "conv1d_same": lambda: conv(1, 4, 6, 4, padding="same", dilation=2),
    "conv1d_circular": lambda: conv(1, 4, 6, 3, padding=2, stride=2, padding_mode="circular"),
    "conv2d": lambda: conv(2, 4, 6, 3, padding=1),
    "conv2d_no_batch": lambda: (nn.Conv2d(4, 6, 3), (torch.randn(4, 7, 7),), {}),
    "conv2d_channels_last": lambda: (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
                                     (torch.randn(2, 4, 7, 7).to(memory_format=torch.channels_last),), {}),
    "conv2d_odd": lambda: conv(2, 4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), bias=False),
    "conv2d_valid": lambda: conv(2, 4, 6, 3, padding="valid", stride=2),
    "conv2d_same_reflect": lambda: conv(2, 4, 6, 3, padding="same", dilation=2, padding_mode="reflect"),
    "conv2d_replicate": lambda: conv(2, 4, 6, 3, padding=(1, 2), padding_mode="replicate"),
    "conv2d_circular": lambda: conv(2, 4, 6, 3, padding=1, padding_mode="circular"),
    "conv2d_grouped": lambda: conv(2, 4, 6, 3, padding=1, groups=2),
    "conv2d_grouped_circular": lambda: conv(2, 4, 6, 3, padding=1, groups=2, padding_mode="circular"),
    "conv2d_depthwise": lambda: conv(2, 4, 4, 3, padding=1, groups=4),
    "conv2d_depthwise_multiplied": lambda: conv(2, 4, 8, 3, stride=2, dilation=2, padding=3, groups=4),
    "conv2d_pointwise": lambda: conv(2, 4, 6, 1),
    "conv3d": lambda: conv(3, 4, 6, 3, padding=1, size=4),
    "conv3d_replicate": lambda: conv(3, 4, 6, 3, padding=1, size=4, stride=2, padding_mode="replicate"),
    "conv3d_depthwise": lambda: conv(3, 4, 4, 3, padding="same", groups=4, size=4),
    "transposed1d": lambda: transposed(1, 4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed1d_grouped": lambda: transposed(1, 4, 6, 3, groups=2, dilation=2),
    "transposed2d": lambda: transposed(2, 4, 6, 3, stride=2, padding=1),
    "transposed2d_size": lambda: transposed(2, 4, 6, 3, stride=2, padding=1, more={"output_size": [8, 7]}),
    "transposed2d_depthwise": lambda: transposed(2, 4, 4, 3, stride=2, groups=4, bias=False),
    "transposed3d": lambda: transposed(3, 4, 6, 3, stride=2, padding=1, output_padding=(1, 0, 1)),
    "conv1d_of_transformers": conv1d_of_transformers,
    "attention": lambda: attention(),
    "attention_batch_first": lambda: attention(batch_first=True, bias=False),
    "attention_kdim": lambda: attention(kdim=6, vdim=10, batch_first=True),
    "attention_bias_kv": lambda: attention(add_bias_kv=True, add_zero_attn=True),
    "encoder_layer": lambda: encoder_layer(),
    "encoder_layer_norm_first": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "timm_conv2d_same": lambda: of_timm("Conv2dSame", 4, 6, 3, stride=2),
    "timm_std_conv2d": lambda: of_timm("StdConv2d", 4, 6, 3, padding=1),
    "timm_attention": lambda: (of_timm("Attention", 8, num_heads=2, qkv_bias=True)[0], (torch.randn(2, 5, 8),), {}),
    "swin": lambda: swin(1),
    "swin_v2": lambda: swin(2),
}


def boxed(kind, dtype=torch.float32, seed=0):
    """(model, inputs, keyword inputs) of a kind; evaluated, not trained: no dropout, and torch's fast paths."""
    torch.manual_seed(seed)
    layer, inputs, more = KINDS[kind]()
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    return Box(layer).to(dtype).eval(), inputs, more


def adapted(kind, dtype=torch.float32, **config):
    """The same with an adapter on all that can have one."""
    model, inputs, more = boxed(kind, dtype)
    config = {"rank": 3, "target_modules": r"layer.*"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of half precision
        ts.adapt(model, ts.TuckerConfig(**config))
    return model, inputs, more


def parts_of(model, name="default"):
    """The factors of an adapter by the name of the parameter that they change."""
    return {f"{key}.{parameter}": part for key, layer in model.named_modules() if hasattr(layer, "tucker")
            for parameter, part in (layer.tucker[name] if name in layer.tucker else {}).items()}


@torch.no_grad()
def disturb(model, name="default", size=0.3, seed=1):
    """Cores that are not zero; returns the model."""
    draw = torch.Generator().manual_seed(seed)
    for part in parts_of(model, name).values():
        part.core.copy_(size * torch.randn(part.core.shape, generator=draw, dtype=torch.float64))
    return model


def change(part, dtype=torch.float64):
    """scale * core x_0 factor0 x_1 factor1 ..., one mode after the other."""
    out = part.core.to(dtype)
    for i, factor in enumerate(part.factors):
        if factor is not None:
            out = torch.tensordot(factor.to(dtype), out, dims=([1], [i])).movedim(0, i)
    return part.scale * out


def relative(a, b):
    """|a - b| / |b|"""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


class Net(nn.Module):
    """A small model with the usual names: two convolutions, a norm, two linear layers and a head."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1, groups=2), "fc": nn.Linear(8, 8)})
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.body["conv"](x).relu().mean((-2, -1))
        return self.head(self.body["fc"](x).relu())


def net(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs).eval(), torch.randn(4, 3, 6, 6)


def written(path, name="default", seed=0, **config):
    """A model with an adapter and a changed head, saved to path."""
    model, x = net(seed)
    disturb(ts.adapt(model, ts.TuckerConfig(**{"rank": 2, "alpha": 3.0, "scaling": "constant", "save_modules": "head"}
                                            | config), name))
    with torch.no_grad():
        model.head.bias += 1
    ts.save_adapter(model, path, name)
    return model, x


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def gradients(model, inputs, more=(), seed=0):
    model.zero_grad()
    y = model(*inputs, **dict(more))
    draw = torch.Generator().manual_seed(seed)
    y.float().backward(torch.randn(y.shape, generator=draw))
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))  # of torch.compile and DDP
    return y.detach(), {n: p.grad.clone() for n, p in inner.named_parameters() if p.grad is not None}
