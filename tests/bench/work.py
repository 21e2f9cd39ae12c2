"""What each op must move and do at least: bytes and flops of one call, its formulas in one place.

Bytes are those of the arguments that are read and of the results that are written, forward and backward each once; what
a call keeps from one to the other is its own affair. Flops are those of the matrix products and transforms that its
formula can't do without: of a product known to be symmetric one triangle, so half, of a convolution what meets input
and not padding. Left out are norms, exponentials, factorisations and the k x k part of a step, which is more than the
rest for short frames of many rows: no bound is made of them. tests/test_bench_work.py counts both.
"""

FLOAT, LONG = 4, 8  # bytes


def logits(b, n, c, k, backward, size=FLOAT):
    """z = x Wᵀ, and in the backward dx = dz W, dW = dzᵀ x."""
    x, w, y = b * n, c * k * n, b * c
    read = x + w + y + (2 * (x + w) + y if backward else 0)
    return {"bytes": size * read, "flops": (6 if backward else 2) * b * n * c * k}


def cross_entropy(b, n, c, k, size=FLOAT):
    """The same three products; the logits themselves need not be in memory."""
    return {"bytes": 3 * size * (b * n + c * k * n) + 2 * LONG * b + 2 * size, "flops": 6 * b * n * c * k}


def rsgd(c, k, n):
    """Frame, gradient and momentum are read, frame and momentum written. Of every class M Wᵀ, a triangle of M Mᵀ (which
    with the former gives that of the horizontal part D), and both products of W' = cos W - sinc D in W and M."""
    return {"bytes": 5 * FLOAT * c * k * n, "flops": 7 * c * k * k * n}


def assignment(n, features, clusters, k):
    """Points times all frames; a label each."""
    return {"bytes": FLOAT * (n + clusters * k) * features + LONG * n, "flops": 2 * n * features * clusters * k}


def k_subspaces(n, features, clusters, k):
    """The same and, of each cluster, a Gram matrix on its smaller side; the frames are written. Eigenproblems are not
    counted."""
    own = n / clusters
    product = 2 * n * features * clusters * k
    return {"bytes": FLOAT * (n + 2 * clusters * k) * features,
            "flops": product + int(clusters * min(own, features) ** 2 * max(own, features))}


def denoise(n, features, clusters, k):
    """Points times all frames, and the weighted projections' way back."""
    return {"bytes": FLOAT * (2 * n + clusters * k) * features, "flops": 4 * n * features * clusters * k}


def patch(n, d, r):
    """The change's coordinates and their way back; the same of the gradient; two products for the basis'."""
    return {"bytes": FLOAT * (8 * n + 3 * r) * d, "flops": 12 * n * d * r}


def distances(b, t, d, k):
    """Tokens times the basis and the basis' gradient; of each sentence a triangle of inner products, and the gradient's
    product with it. The tokens want none."""
    return {"bytes": FLOAT * (2 * b * t * (d + t) + 3 * k * d), "flops": b * t * k * (4 * d + 3 * t)}


def probe(b, t, d, k, pairs, tokens):
    """The first two of these, and three products with the vectors of either kind of labels."""
    scored = (t - 1) * pairs + t * tokens
    numbers = b * (t * d + t - 1) + (k * d + (pairs + tokens) * k)
    gradients = (d + pairs + tokens) * k
    return {"bytes": FLOAT * (2 * numbers + gradients + 2) + 2 * LONG * b * (2 * t - 1),
            "flops": b * k * (4 * t * d + 6 * scored)}


def grouped_normalize(n, features):
    """No product."""
    return {"bytes": 5 * FLOAT * n * features, "flops": 0}


def margin_loss(n, features, d):
    """The embedding's three products; a triangle of the points' inner products, and the gradient's product with it."""
    leaves = n * features + features * d + d
    return {"bytes": FLOAT * (3 * leaves + 2) + 2 * LONG * n, "flops": 6 * n * features * d + 3 * n * n * d}


def gated_cosine(b, n, k):
    """Two products forward, four backward."""
    return {"bytes": FLOAT * (3 * (2 * b + n) * k + 2 * b * n), "flops": 12 * b * n * k}


def lambda_orthogonality(layers, d):
    """A triangle of W Wᵀ, and its product with W."""
    return {"bytes": FLOAT * (3 * layers * d * d + 2), "flops": 3 * layers * d**3}


def sigreg(views, n, d, slices):
    """Points times directions, and the gradient's way back."""
    points = views * n * d
    return {"bytes": FLOAT * (3 * points + 2 * d * slices + 2), "flops": 4 * points * slices}


def entropy(n, d):
    """A triangle of the Gram matrix, one of what its eigenvectors make of logarithms, and a product of the points with
    that. Eigenproblems are not counted."""
    return {"bytes": FLOAT * (3 * n * d + 2), "flops": 3 * n * d * d + d**3}


def ridge(n, d):
    """A triangle of Zᵀ Z, and Zᵀ Z'; the solution's product with its gradient, and the way back to Z and Z'. Solves are
    not counted."""
    return {"bytes": FLOAT * (6 * n * d + 2 * d * d), "flops": 9 * n * d * d + 2 * d**3}


def koopman(b, t, d, k):
    """Of each trajectory this, three products with the mean transition, and three with the cosines of points that have
    all neighbours; the entropy of all points."""
    flops = b * (ridge(t, d)["flops"] + 6 * t * d * d + 6 * (t - 2 * k) * t * d) + entropy(b * t, d)["flops"]
    return {"bytes": FLOAT * (6 * b * t * d + 2), "flops": flops}


def procrustes(n, d, backward):
    """Xᵀ Y and U Vᵀ; Uᵀ dQ V and its way back, then X and Y times that. Singular values are not counted."""
    return {"bytes": FLOAT * ((6 if backward else 2) * n * d + (2 if backward else 1) * d * d),
            "flops": 6 * n * d * d + 10 * d**3 if backward else 2 * n * d * d + 2 * d**3}


def orthogonal_adapter(n, d):
    """A linear layer's. The map from its parameters to Q is not counted."""
    return {"bytes": FLOAT * (5 * n * d + 3 * d * d), "flops": 6 * n * d * d}


def distillation(n):
    """No product. The old similarities are read twice, too."""
    return {"bytes": FLOAT * (5 * n * n + 2), "flops": 0}


def group_lasso(rows, columns):
    """No product."""
    return {"bytes": FLOAT * (3 * rows * columns + 2), "flops": 0}


def proximal(rows, columns):
    """No product. The weight is read and written."""
    return {"bytes": 2 * FLOAT * rows * columns, "flops": 0}


def hadamard(v, n):
    """A sum or a difference for each bit of each place."""
    return {"bytes": 2 * FLOAT * v * n, "flops": v * n * bits(n)}


def fastfood(d, size):
    """Four transforms as short as zeros before the first and what is thrown away after the second let them be, and the
    sums that fold the long vector into the shorter of both."""
    p, q = 1 << bits(d), 1 << bits(size)
    return {"bytes": 2 * FLOAT * (d + size), "flops": 2 * (p * bits(p) + q * bits(q)) + abs(p - q)}


def bits(n):
    """⌈log₂ n⌉."""
    return (n - 1).bit_length()


def product(m, n, k):
    """Added to what is there, which is read and written."""
    return {"bytes": FLOAT * (m * k + k * n + 2 * m * n), "flops": 2 * m * n * k}


def newton_schulz(m, n):
    """Five steps on the matrix, of each A = X Xᵀ, A² and (b A + c A²) X; or all on the first Gram matrix R: R² five
    times, Q P four times, P R P four times, then Q X."""
    s, long = min(m, n), max(m, n)
    return {"bytes": 2 * FLOAT * m * n, "flops": min(3 * s * s * long + 17 * s**3, 5 * (3 * s * s * long + s**3))}


def trion(m, n, rank):
    """Newton-Schulz of r columns, and both products with the basis. Weight, gradient and momentum are read, weight and
    momentum written."""
    return {"bytes": 5 * FLOAT * m * n, "flops": 4 * m * n * rank + newton_schulz(max(m, n), rank)["flops"]}


def trion_model(shapes, rank):
    """That of each matrix."""
    each = [trion(m, n, rank) for m, n in shapes]
    return {key: sum(one[key] for one in each) for key in ("bytes", "flops")}


def coso(n, rank, sketch, memory):
    """Three products at the sketch's width, two at the rank, two with the memory. Weight, gradient and memory are read,
    the weight written, the sketch and both moments read and written."""
    state = sketch * n + 2 * rank * n
    return {"bytes": FLOAT * (3 * n * n + memory * n + 2 * state),
            "flops": 2 * n * n * (3 * sketch + 2 * rank + 2 * memory)}


def low_rank_adamw(shapes, rank, found):
    """Of each matrix with more than `rank` on a side the gradient's projection and the way back; two more products
    where directions are found. Weight and gradient are read, the weight written; both moments read and written, of all
    weights' numbers where there is no projection."""
    moved = flops = 0
    for shape in shapes:
        m, n = max(shape), min(shape) if len(shape) > 1 else 1
        low = n > rank
        moved += 3 * m * n + 4 * m * (rank if low else n)
        flops += 2 * (4 if found else 2) * m * n * rank if low else 0
    return {"bytes": FLOAT * moved, "flops": flops}


def coding_rate(n, d, classes):
    """Of each class a triangle of the Gram matrix on its smaller side, and a product with its inverse."""
    sizes = [-(-(n - c) // max(classes, 1)) for c in range(max(classes, 1))]
    labels = 2 * LONG * n if classes else 0
    return {"bytes": FLOAT * (3 * n * d + 2) + labels, "flops": sum(3 * min(m, d) ** 2 * max(m, d) for m in sizes)}


def coding_rate_soft(n, d, k):
    """Of each class a triangle of its weighted Gram matrix, and a product of all points with its inverse."""
    return {"bytes": FLOAT * (3 * (n * d + n * k) + 2), "flops": 3 * n * k * d * d}


def sinkhorn(n):
    """Scores in, plan out; plan and its gradient in, the scores' out. A sweep forward, one product backward."""
    return {"bytes": 5 * FLOAT * n * n, "flops": 4 * n * n}


def inside(side, out, k, stride=1, padding=0):
    """Pairs of a place of the output and a tap whose input is not padding, of a square of such."""
    return sum(0 <= place * stride + tap - padding < side for place in range(out) for tap in range(k)) ** 2


def depthwise(b, c, side, k):
    """A multiply and an add for every place and tap; as much padding as leaves the side as it is."""
    x = b * c * side * side
    return {"bytes": FLOAT * (2 * x + c * k * k), "flops": 2 * b * c * inside(side, side, k, padding=k // 2)}


def tucker(shape, ranks):
    """Kernel modes first, then inputs, then outputs. Core, factors and base are read, the weight is written."""
    o, i, h, w = shape
    a, b, c, d = ranks
    flops = 2 * a * b * h * (c * d + d * w) + 2 * i * a * b * h * w + 2 * o * a * i * h * w
    factors = o * a + i * b + h * c + w * d
    return {"bytes": FLOAT * (2 * o * i * h * w + a * b * c * d + factors), "flops": flops}


def tucker_linear(t, into, out, rank, size=FLOAT):
    """The frozen layer and its input's gradient; three thin products beside them, forward and both gradients of each.
    x and the weight are read twice, dy once; y and dx are written."""
    x, y, r = t * into, t * out, min(rank, into, out)
    thin = r * (into + r + out)
    return {"bytes": size * (3 * x + 2 * y + 2 * into * out) + 3 * FLOAT * thin,
            "flops": 4 * t * into * out + 6 * t * thin}


def tucker_conv(x, y, kernel, groups, rank, size=FLOAT, stride=1, padding=0):
    """The same of a convolution from x to y, (B, C, side, side): what it trains takes three thin convolutions, the
    first of all of x, or the dense weight's gradient, whichever is less. Of groups it is the latter."""
    b, i, side, _ = x
    o, places, taps = y[1], b * y[2] * y[3], kernel * kernel
    reached = b * inside(side, y[2], kernel, stride, padding)
    whole = 2 * reached * o * i // groups
    p, q = min(rank, o), min(rank, i // groups)
    thin = 6 * (b * side * side * i * q + reached * p * q + places * p * o)
    flops = 2 * whole + (whole if groups > 1 else min(thin, whole))
    moved = 3 * b * i * side * side + 2 * places * o + 2 * o * i // groups * taps
    trained = taps * p * q + p * o + q * i // groups
    return {"bytes": size * moved + 3 * FLOAT * trained, "flops": flops}
