"""Subspaces as classes: logits, the fused loss, Riemannian steps, the layer, head surgery and optimisers."""
