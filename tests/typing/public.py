# pyright: strict
"""Every public name as a user's strictly checked code has it: read by mypy --strict and pyright's strict mode in `make
lint`, never run. A test asks that no public name is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torch_subspace as ts
from torch_subspace import metrics
from torch_subspace import peft as tucker_peft

x, labels = torch.randn(8, 16), torch.zeros(8, dtype=torch.int64)
frames = torch.randn(4, 2, 16)

# ------------------------------------------------------------------------------------------------------------- heads
logits: Tensor = ts.subspace_logits(x, frames, gamma=25.0, normalize=True, dims=None)
ragged: Tensor = ts.subspace_logits(x, frames.flatten(0, 1), dims=[2, 2, 2, 2])
loss: Tensor = ts.subspace_cross_entropy(x, frames, labels, class_weight=None, label_smoothing=0.1, reduction="mean")
skipped: Tensor = ts.grassmann_step_(frames, torch.zeros_like(frames), None, lr=0.1, retraction="geodesic")
layer: ts.GrassmannLinear = ts.GrassmannLinear(16, 4, subspace_dim=2)
y: Tensor = layer(x)
fused: Tensor = layer.loss(x, labels, label_smoothing=0.1)
weight: nn.Parameter = layer.weight
made: ts.GrassmannLinear = ts.GrassmannLinear.from_linear(nn.Linear(16, 4))
layer.init_from_features(x, labels)
layer.orthonormalize_()
error: Tensor = layer.frame_error()
net: nn.Module = ts.swap_head(nn.Sequential(nn.Linear(16, 4)), num_classes=4, subspace_dim=2, gamma="auto", name=None)
groups: list[dict[str, Any]] = ts.param_groups(net, weight_decay=1e-4, frame_lr_factor=0.3)
sgd: torch.optim.Optimizer = ts.RiemannianSGD(groups, lr=0.1, momentum=0.9, nesterov=True)
adam: torch.optim.Optimizer = ts.RiemannianAdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99))
closure: Callable[[], float] = lambda: 0.0  # noqa: E731
got: float | None = sgd.step(closure)
nothing: None = ts.RiemannianSGD(net.parameters()).step()
ts.RiemannianSGD(net.parameters(), momentum=0.9).catch_up()
left: int | Tensor = ts.RiemannianAdamW(net.parameters()).skipped_frames

mean: Tensor = ts.grassmann.average_frames([frames, frames], [1, 2], of="bases")
average = torch.optim.swa_utils.AveragedModel(net, avg_fn=ts.grassmann.FrameAverage(decay=0.99))

spans: Tensor = ts.grassmann.class_subspaces(x, labels, 2, num_classes=4)
held: Tensor = ts.grassmann.subspace_scores(x, spans)
lines = ts.grassmann.KSubspaces(4, dim=1, n_init=2, tol=1e-3, random_state=0).fit(x.numpy()).predict(x.numpy())
clean: Tensor = ts.grassmann.subspace_denoise(x, spans, signal=1.0, noise=0.3)
patched: Tensor = ts.grassmann.subspace_patch(x, x + 1, spans[0])
patch: ts.grassmann.SubspacePatch = ts.grassmann.SubspacePatch(16, 3, dtype=torch.float64)
swapped: Tensor = patch(x, x + 1)
read, unseen = ts.grassmann.rowspace_split(x, spans[0])
probe: ts.grassmann.OrthogonalProbe = ts.grassmann.OrthogonalProbe(16, 4, token_labels=3)
syntax: Tensor = probe.loss(torch.randn(2, 5, 16), torch.ones(2, 4), token=torch.zeros(2, 5, dtype=torch.int64))
units: Tensor = ts.grassmann.grouped_normalize(x, [8, 4, 4])
learners = ts.grassmann.DynamicSubspaceLearners(16, dim=32, threshold=0.4)
cluster: Tensor = learners.assign(x, None, seed=0)
pairs: Tensor = learners.loss(x, labels, learner=0)
more: bool = learners.split(process_group=None)

mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
style = ts.distributed.ClassParallel(sample_rate=0.1, sparse_grad=True, use_local_output=True)
shared: nn.Sequential = ts.distributed.shard_head(nn.Sequential(layer), mesh, sample_rate=0.1)
planned = ts.distributed.plan(1000, 64, [4] * 1000, batch=32, ranks=2, optimizer="adamw", dtype=torch.bfloat16)
peak: int = planned.peak + planned.step.memory

# ---------------------------------------------------------------------------------------------------------- adapters
config = ts.TuckerConfig(rank=8, alpha=16.0, target_modules="all-linear", save_modules=["head"], dropout=0.1)
small = ts.TuckerConfig(init="lora", train="all")
spectral = ts.SpectralConfig(0.99, target_modules="all-linear", rank_pattern={"fc": 8}, save_vectors=True)
adapted: nn.Module = ts.adapt(net, config, name="default")
ts.adapt(net, spectral, name="values")
of_adapter: list[dict[str, Any]] = ts.adapter_parameters(net)
table: str = ts.adapter_summary(net)
names: list[str] = ts.adapter_names(net)
active: dict[str, float] = ts.active_adapters(net)
ts.set_adapter(net, {"default": 0.5})
ts.save_adapter(net, Path("adapter.safetensors"), name="default")
loaded: nn.Module = ts.load_adapter(net, "adapter.safetensors")
with ts.disabled(net):
    plain: Tensor = net(x)
merged: nn.Module = ts.merge(net)
unmerged: nn.Module = ts.unmerge(net)
ts.delete_adapter(net, "default")
whole: nn.Module = ts.merge_and_unload(net)
core, u, v = torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(3, 16)
change: Tensor = ts.tucker_compose(core, [u, v.mT], scale=0.5, base=None)
linear: Tensor = ts.tucker_linear(x, torch.zeros(4, 16), None, core, u, v, scale=0.5, dropout=0.1, training=True)
conv: Tensor = ts.tucker_conv(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3), None, torch.zeros(2, 2, 3, 3),
                              [torch.zeros(4, 2), torch.zeros(3, 2), None, None], padding=1, form="chain")

# ------------------------------------------------------------------------------------------------------------- rates
rate: Tensor = ts.coding_rate(x, labels, eps=0.5)
reduction: Tensor = ts.rate_reduction(x, labels)
plan: Tensor = ts.sinkhorn(x @ x.mT, eta=0.1, tol=1e-6, max_iter=100, symmetric=True, mode="implicit")
total: Tensor = ts.CodingRateLoss(eps=0.5)(x)
mcr2: Tensor = ts.MCR2Loss(eps=0.5)(x, labels)
mlc: Tensor = ts.MLCLoss(eps=0.2, eta=0.1, reg=0.05)(x, x)
spread: Tensor = ts.isotropy.sigreg(x, num_slices=64, knots=17, t_max=3.0, directions=None, seed=0, views="pooled")
spread_loss: Tensor = ts.isotropy.SIGRegLoss(64, reduction="sum")(x, seed=1)
joint: Tensor = ts.isotropy.LeJEPALoss(weight=0.05, num_slices=64, distance="mean")(x[None], x[None], seed=1)
entropy: Tensor = ts.isotropy.von_neumann_entropy(x, of="covariance")
dynamics: Tensor = ts.isotropy.ridge_transition(x, x, eta=0.1)
koopman: Tensor = ts.isotropy.KoopmanInformationLoss(k=2, entropy="minimise")(x[None], x[None], decode=nn.Linear(16, 4),
                                                                              states=x[None], next_states=x[None])
koopman += ts.isotropy.koopman_information_loss(x[None], x[None], decode=None, k=2, detach=True, process_group=None)
turn: Tensor = ts.isotropy.procrustes(x, x)
adapter: ts.isotropy.OrthogonalAdapter = ts.isotropy.OrthogonalAdapter(16, dtype=torch.float64)
turned: nn.Linear = adapter.merge(nn.Linear(4, 16))
near: Tensor = ts.isotropy.lambda_orthogonality(x, 0.5) + ts.isotropy.lambda_orthogonality([x, x.mT], 0.5, alpha=2.0)
near += ts.isotropy.LambdaOrthogonalityLoss(0.5, alpha=2.0, reduction="sum")([x, x.mT])
taught: Tensor = ts.isotropy.similarity_distillation(x @ x.mT, x @ x.mT, tau=0.1, alpha=1.0, rows="all", diagonal=False)
taught += ts.isotropy.SimilarityDistillationLoss(tau=0.1, alpha=1.0, divergence_tau=1.0)(x @ x.mT, x @ x.mT)
cosines: Tensor = ts.isotropy.gated_cosine(x, x, x.sigmoid())
simlap: ts.isotropy.SimLAPLoss = ts.isotropy.SimLAPLoss(10, 16, tau=0.1, width=32, dtype=torch.float32)
gates: Tensor = simlap.gate(labels, labels) + simlap(x, x, labels, labels)
contrast: Tensor = ts.isotropy.simlap_loss(x, x, gates, labels, labels, tau=0.1, process_group=None)
sparse: Tensor = ts.isotropy.group_lasso(x, [4, 4]) + ts.isotropy.prox_group_lasso_(x, (4, 4), 0.1)
sparse += ts.isotropy.GroupLassoLoss([4, 4])(x)
low = ts.lowrank.LowRankAdamW(net.parameters(), lr=1e-3, rank=4, projector="cosine", every=2, error_feedback="int8")
low_bytes: int = low.state_bytes()
low_skipped: int | Tensor = low.skipped
low.step()
basis: Tensor = ts.lowrank.range_finder(x, 4, power=2, seed=0) + ts.lowrank.range_finder(x, 4, seed=torch.Generator())
cosine_part: tuple[Tensor, Tensor] = ts.lowrank.cosine_columns(x, 4)
cosine: Tensor = ts.lowrank.cosine_basis(16, cosine_part[1], dtype=torch.float64, device="cpu")
orthogonal: Tensor = ts.lowrank.newton_schulz(x, steps=5, coefficients=[(1.5, -0.5, 0.0)], eps=1e-7)
trion = ts.lowrank.Trion(ts.lowrank.trion_groups(net, adamw=["0"], lr=0.02), rank=4, momentum=0.95, stacked=False,
                         ns_coefficients="polar_express", adjust_lr_fn="match_rms_adamw", adamw_factor=None)
trion_bytes: int = trion.state_bytes()
trion_skipped: int | Tensor = trion.skipped
trion.step()
turned_over: Tensor = ts.lowrank.hadamard(x, normalize=True)
many: Tensor = ts.lowrank.fastfood(x, 100, seed=0) + ts.lowrank.fastfood_adjoint(x, 100, seed=0)
clusterer = ts.ManifoldClustering(n_clusters=4, random_state=0)
clusterer = ts.ManifoldClustering(n_clusters=None, random_state=0)
clusters = clusterer.fit(x.numpy()).predict(x.numpy())
accuracy: float = metrics.clustering_accuracy(labels, labels)
scores: dict[str, float] = metrics.clustering_scores(labels, labels)
renamed: np.ndarray = metrics.match_clusters([0, 1], labels)
width: float = metrics.effective_rank(x)
angles: Tensor = metrics.principal_angles(x, labels, dim=2)
ts.show_config()
ts.set_float32_matmul_precision("highest")
precision: str = ts.get_float32_matmul_precision()
rows: Tensor = ts.lowrank.frequent_directions_(torch.zeros(4, 16), x, decay=0.9)
stream = ts.lowrank.StreamingPCA(2, method="oja", n_aside=4, random_state=0).partial_fit(x.numpy()).transform(x.numpy())
continual: torch.optim.Optimizer = ts.lowrank.CoSO(net.parameters(), lr=4e-4, rank=8, sketch_rank=16, threshold=0.95)
ts.lowrank.CoSO([{"params": net.parameters(), "protect": False}], decay=0.9).consolidate()
kept: Tensor = ts.lowrank.CoSO(net.parameters()).memory(next(net.parameters()))

# ----------------------------------------------------------------------------------------------------- few dimensions
few: ts.lowrank.RandomSubspace = ts.lowrank.RandomSubspace(nn.Linear(16, 4), 8, "sparse", seed=1)
moved: dict[str, Tensor] = few.parameters_at(torch.zeros(8))
unwrapped: nn.Module = few.merge_and_unload()
needed: ts.lowrank.IntrinsicDimension = ts.lowrank.intrinsic_dimension(
    lambda: nn.Linear(16, 4), lambda model: model(x).argmax(1).eq(0).float().mean(), 0.8, kind="dense", seeds=(0, 1),
    start=8, most=32, tolerance=0.2, verbose=False)
needed.plot(Path("d80.png"))

# -------------------------------------------------------------------------------------------------------------- peft
method = tucker_peft.TuckerConfig(r=8, target_modules=["0"])
values = tucker_peft.SpectralConfig(r=0.99, target_modules=["0"])
imported: nn.Module = tucker_peft.import_lora(net, "lora", standalone=True)
tucker_peft.export_lora(imported, Path("lora"))
