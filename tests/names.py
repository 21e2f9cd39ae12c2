"""Where the public names are, read from the package's files: a family that is new has its place here by itself."""

import ast
from pathlib import Path

OPS = Path(__file__).resolve().parent.parent / "ops"
NEED_MORE = {"torch_subspace": ["ManifoldClustering"]}  # public, but not in __all__: they need other packages


def exported(path):
    """What a file's `__all__` lists."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__":
            return ast.literal_eval(node.value)
    return []


def homes():
    """{module: its public names}: the package, its families and its modules beside them."""
    found = {}
    for path in [*OPS.glob("*.py"), *OPS.glob("*/__init__.py")]:
        parts = path.relative_to(OPS).with_suffix("").parts
        home = ".".join(["torch_subspace", *(part for part in parts if part != "__init__")])
        if names := exported(path) + NEED_MORE.get(home, []):
            found[home] = names
    return dict(sorted(found.items()))


HOMES = homes()
PEFT = "torch_subspace.peft"  # whose import needs peft
