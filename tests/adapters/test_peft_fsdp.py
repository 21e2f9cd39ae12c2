"""peft's method under FullyShardedDataParallel, which lays plain tensors over the parameters during a forward."""
import copy

import pytest
import torch
import torch.distributed as dist
from adapter_cases import relative
from peft_cases import Holder, OwnForward, peft, quiet
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from torch_subspace.peft import TuckerConfig

pytestmark = quiet


class Stack(nn.Module):
    """Experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.w)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


MODULES = {"linear": (lambda: nn.Linear(4, 6), (5, 4)), "own forward": (lambda: OwnForward(4, 6, 3), (2, 4, 7, 8)),
           "parameters": (Stack, (5, 4)), "attention": (lambda: Attention(4, 2), (5, 4))}


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*CPU backend", "ignore:.*NO_SHARD")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_the_change_is_in_the_forward(kind, grad):
    torch.manual_seed(0)
    make, size = MODULES[kind]
    targets = {"target_parameters": ["w"]} if kind == "parameters" else {"target_modules": ["layer"]}
    adapted, x = peft.get_peft_model(Holder(make()), TuckerConfig(r=2, **targets)), torch.randn(size)
    base = adapted(x)
    for n, p in adapted.named_parameters():
        if n.endswith("core"):
            nn.init.normal_(p)
    y = adapted(x)
    sharded = FullyShardedDataParallel(copy.deepcopy(adapted), use_orig_params=True, device_id="cpu")
    with torch.set_grad_enabled(grad):
        got = sharded(x)
    assert relative(got, base) > 1e-2 and relative(got, y) < 1e-6
    if grad:
        y.square().sum().backward()
        got.square().sum().backward()
        want = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
        found = {n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in sharded.named_parameters()}
        assert all(relative(found[n], g) < 1e-5 for n, g in want.items())
