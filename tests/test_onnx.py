"""ONNX by both of torch's exporters, run by onnxruntime on another batch: heads, adapted layers, merged ones."""

import warnings

import pytest
import torch
from helpers import optional
from torch import nn

import torch_subspace as ts
from torch_subspace.grassmann.head import PointwiseGrassmannLinear


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


def adapted(module, target, merge=None):
    ts.adapt(model := nn.ModuleDict({"layer": module}), ts.TuckerConfig(rank=2, target_modules=target))
    for p in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(p, std=0.3)
    if merge:
        merge(model)
    return model["layer"]


class Several(nn.Module):
    """What should be exportable, in one graph: an export takes seconds."""

    def __init__(self, everything):
        super().__init__()
        torch.manual_seed(0)
        rows = [
            ts.GrassmannLinear(8, 5, (1, 2, 3, 1, 4)),
            nn.Sequential(adapted(nn.Linear(8, 6), "layer"), ts.GrassmannLinear(6, 4, 3, normalize=False)),
            adapted(nn.Linear(8, 6), "layer", ts.merge),
            adapted(nn.Linear(8, 6), "layer", ts.merge_and_unload),
            adapted(Attention(), "mha"),
        ]
        images = [
            adapted(nn.Conv2d(8, 6, 3, padding=1), "layer"),
            PointwiseGrassmannLinear(8, 5, 2),
            adapted(nn.Conv2d(8, 8, 3, groups=8), "layer"),
        ]
        self.rows = nn.ModuleList(rows if everything else rows[:2])
        self.images = nn.ModuleList(images if everything else images[:1])
        self.embedding = adapted(nn.Embedding(9, 6), "layer")

    def forward(self, x, image, tokens):
        return (*(m(x) for m in self.rows), *(m(image) for m in self.images), self.embedding(tokens))


def inputs(batch):
    return torch.randn(batch, 3, 8), torch.randn(batch, 8, 5, 5), torch.randint(9, (batch, 4))


NAMES = ["x", "image", "tokens"]


def from_module(model, path):
    shapes = {name: {0: torch.export.Dim("batch")} for name in NAMES}
    torch.onnx.export(model, inputs(4), path, dynamo=True, input_names=NAMES, dynamic_shapes=shapes, verbose=False)


def from_program(model, path):
    shapes = {name: {0: torch.export.Dim("batch")} for name in NAMES}
    program = torch.export.export(model, inputs(4), dynamic_shapes=shapes)
    torch.onnx.export(program, (), path, dynamo=True, input_names=NAMES, verbose=False)


def from_trace(model, path):
    axes = {name: {0: "batch"} for name in NAMES}
    torch.onnx.export(model, inputs(4), path, dynamo=False, input_names=NAMES, dynamic_axes=axes)


@pytest.mark.slow
@pytest.mark.parametrize("export", [from_module, from_program, from_trace])
def test_onnxruntime_gets_what_we_get(export, tmp_path):
    runtime = optional("onnxruntime")
    optional("onnxscript")
    model = Several(everything=export is not from_module).eval()  # it differs from a program in what is captured
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and onnx's own
        export(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (4, 7):
        given = inputs(batch)
        found = session.run(None, {name: t.numpy() for name, t in zip(NAMES, given)})
        for y, expected in zip(found, model(*given), strict=True):
            torch.testing.assert_close(torch.from_numpy(y), expected.detach(), rtol=1e-4, atol=1e-5)
