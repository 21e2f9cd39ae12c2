"""The truth the kernels are held against: plain torch in float64, one obvious formula at a time.

Nothing here is fast, and nothing shares more with the kernels than a formula on paper: the geodesic goes
through an SVD, the polar factor through eigh, Cayley through its n x n matrix.
"""

import torch

# ---------------------------------------------------------------------------------------------------------------------
# rsgd: one step of Riemannian SGD on frames, rows orthonormal, `weight` (..., k, n)
# ---------------------------------------------------------------------------------------------------------------------


def orthonormal(weight):
    """The frame nearest to `weight`: its polar factor. A step starts there, so that drift does not add up."""
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    return u @ vt


def horizontal(weight, direction):
    """The part of `direction` that moves the subspace: what is left without its components in the span of the rows."""
    return direction - direction @ weight.mT @ weight


def geodesic(weight, tangent):
    """Exponential map: along every singular direction of `tangent` the frame turns by the singular value."""
    u, s, vt = torch.linalg.svd(tangent, full_matrices=False)
    return u @ (s.cos()[..., None] * (u.mT @ weight) + s.sin()[..., None] * vt)


def polar(weight, tangent):
    """(Y Yᵀ)^(-1/2) Y with Y = W + tangent."""
    y = weight + tangent
    value, vector = torch.linalg.eigh(y @ y.mT)
    return (vector * value.rsqrt()[..., None, :]) @ vector.mT @ y


def qr(weight, tangent):
    """The Q of Y = W + tangent, signs chosen so that R has a positive diagonal."""
    q, r = torch.linalg.qr((weight + tangent).mT)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT


def cayley(weight, tangent):
    """W (I + A/2) (I - A/2)^-1 with the skew n x n matrix A = Wᵀ tangent - tangentᵀ W."""
    a = weight.mT @ tangent - tangent.mT @ weight
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    return torch.linalg.solve(eye - a / 2, weight @ (eye + a / 2), left=False)


RETRACTIONS = {"geodesic": geodesic, "polar": polar, "qr": qr, "cayley": cayley}


def transport(weight, tangent, moved):
    """`moved`, a horizontal vector at W, carried in parallel along the geodesic that starts along `tangent`."""
    u, s, vt = torch.linalg.svd(tangent, full_matrices=False)
    along = moved @ vt.mT  # turns with the frame; what is orthogonal to the tangent stays
    return moved - along @ vt + along @ (s.cos()[..., None] * vt - s.sin()[..., None] * (u.mT @ weight))


def rsgd_step(
    weight,
    grad,
    buffer=None,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    retraction="geodesic",
    transport_by="project",
):
    """The new (weight, buffer) of frames (C, k, n); `lr` a number or one per class (C,)."""
    weight, grad = weight.double(), grad.double()
    lr = torch.as_tensor(lr, dtype=torch.float64).reshape(-1, 1, 1)
    g = (-grad if maximize else grad) + weight_decay * weight
    direction = g
    if buffer is not None:
        buffer = momentum * buffer.double() + (1 - dampening) * g
        direction = g + momentum * buffer if nesterov else buffer
    frame = orthonormal(weight)
    tangent = -lr * horizontal(frame, direction)
    if buffer is not None and transport_by == "parallel":
        buffer = transport(frame, tangent, horizontal(frame, buffer))
    return RETRACTIONS[retraction](frame, tangent), buffer


def principal_angles(a, b):
    """Principal angles (..., k) between the row spaces of two frames, accurate near 0 (from sines and cosines)."""
    cos = torch.linalg.svdvals(a @ b.mT).clamp(max=1)
    sin = torch.linalg.svdvals(b - b @ a.mT @ a).clamp(max=1).flip(-1)
    return torch.atan2(sin, cos)
