"""Statements of Python's standard library: vectors of their tokens, and distances in their syntax trees."""

import ast
import bisect
import importlib
import inspect
import io
import tokenize
import zlib

import torch

SIZE, WINDOW = 24, 2  # of a word's vector; neighbours on either side


def statements(module):
    """(words, nodes above each) of the statements of 6 to 24 tokens in a module of the standard library."""
    text, found = inspect.getsource(importlib.import_module(module)), []
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in kinds]
    starts = [t.start for t in tokens]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.Return)):
            inner = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in ast.walk(node)
                     if hasattr(n, "lineno")]
            own = tokens[bisect.bisect_left(starts, inner[0][0]) : bisect.bisect_left(starts, inner[0][1])]
            if 6 <= len(own) <= 24:
                found.append(([t.string for t in own], [{i for i, (begin, end) in enumerate(inner)
                                                         if begin <= t.start and t.end <= end} for t in own]))
    return found


def embedded(words, seed):
    """Random vectors that the words' characters decide, beside those of the neighbours."""
    own = torch.stack([torch.randn(SIZE, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {w}".encode())))
                       for w in [""] * WINDOW + words + [""] * WINDOW])
    return torch.cat([own[i : i + len(words)] for i in range(2 * WINDOW + 1)], 1) / SIZE**0.5


def batch(some, seed):
    """Tokens (statements, most tokens, d), and the tree's distances of neighbours, NaN where there are none."""
    most = max(len(words) for words, _ in some)
    x, tree = torch.zeros(len(some), most, SIZE * (2 * WINDOW + 1)), torch.full((len(some), most - 1), torch.nan)
    for i, (words, above) in enumerate(some):
        x[i, : len(words)] = embedded(words, seed)
        tree[i, : len(words) - 1] = torch.tensor([len(a ^ b) for a, b in zip(above, above[1:])], dtype=torch.float32)
    return x, tree
