"""The tree is what CONTRIBUTING says: each op has all its places, under one word, and no family reaches into another.

What is forgotten fails here by name.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from names import HOMES, PEFT

import torch_subspace as ts
from torch_subspace.grassmann.frames import RETRACTIONS

ROOT = Path(__file__).resolve().parent.parent
CMAKE = (ROOT / "CMakeLists.txt").read_text()
OPS = re.search(r"^set\(ops\s+([^)]+)\)", CMAKE, re.M).group(1).split()  # family/op
FAMILIES = sorted({op.split("/")[0] for op in OPS})
CONTRACT = (ROOT / "shim/contract/subspace.h").read_text()
SHIMS = {path: path.read_text() for path in sorted((ROOT / "shim").glob("*/*.c"))}
REGISTERED = sorted(
    name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("torch_subspace::")
)

sys.path.insert(0, str(ROOT / "tests/gpu"))
import cases  # noqa: E402
import test_cuda_contract as contract  # noqa: E402

each_op = pytest.mark.parametrize("op", OPS)


def word(name):
    """The op that a case's or a row's name begins with."""
    return re.match(r"\w+", name).group()


@each_op
def test_an_op_is_one_word_in_every_folder(op):
    family, name = op.split("/")
    places = (f"ops/{op}.py", f"shim/{op}.c", f"cpu/{op}.c", f"cuda/{op}.cu", f"tests/{family}/test_{name}.py",
              f"tests/native/{family}/test_{name}.cpp", f"tests/gpu/{family}/test_cuda_{name}.py",
              f"tests/bench/{family}/bench_{name}.py", f"tests/bench/results/{name}.json")
    assert not [path for path in places if not (ROOT / path).exists()]


@each_op
def test_it_has_its_rows_for_a_gpu(op):
    name = op.split("/")[1]
    tables = {"CASES": [case.name for case in cases.CASES], "EMPTY": [row[0] for row in contract.EMPTY],
              "REFUSED": list(contract.REFUSED)}
    assert not [table for table, names in tables.items() if name not in map(word, names)]


@each_op
def test_its_tests_ask_what_every_op_is_asked(op):
    family, name = op.split("/")
    names = [o.split("/")[1] for o in OPS]
    texts = [path.read_text() for path in (ROOT / "tests" / family).glob(f"test_{name}*.py")
             if max((n for n in names if path.stem.startswith(f"test_{n}")), key=len) == name]
    asked = ["opcheck", "torch.compile", "pytest.raises", *["gradcheck"] * (f"FN({name}_backward," in CONTRACT)]
    assert not [word for word in asked if not re.search(rf"\b{re.escape(word)}\(", "".join(texts))]


@each_op
def test_readers_hear_of_it(op):
    """Its row of CONTRIBUTING's words, and in the change log what users call."""
    words = (ROOT / ".github/CONTRIBUTING.md").read_text().split("\n## One op, several words\n")[1].split("\n## ")[0]
    assert f"\n| `{op.split('/')[1]}` | " in words
    public = [n for home in HOMES if home != PEFT for n in HOMES[home]
              if getattr(importlib.import_module(home), n).__module__ == f"torch_subspace.{op.replace('/', '.')}"]
    assert not [n for n in public if f"`{n}`" not in (ROOT / "CHANGELOG.md").read_text()]


def test_what_users_call_is_typed():
    """tests/typing/public.py is checked strictly in `make lint`: here, that it leaves no public name out."""
    text = (ROOT / "tests/typing/public.py").read_text()
    names = [f"{home}.{n}".replace("torch_subspace.", "ts." if home == "torch_subspace" else "")
             for home in HOMES if home != PEFT for n in HOMES[home]]
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert (ROOT / "ops/py.typed").exists()


def test_the_contract_lists_the_same_ops():
    listed = CONTRACT.split("#define SUBSPACE_EACH")[1]
    assert re.findall(r"\bOP\((\w+)\) F", listed) == [op.split("/")[1] for op in OPS]


@each_op
def test_both_devices_have_the_same_functions_in_the_same_order(op):
    cpu = re.findall(r"^\w[^;\n]*\bLEVEL\(subspace_(\w+)\)\([^;]*\{", (ROOT / f"cpu/{op}.c").read_text(), re.M)
    cuda = re.findall(r"^[^;\n]*\bsubspace_(\w+)_cuda\([^;]*?\{", (ROOT / f"cuda/{op}.cu").read_text(), re.M)
    name = op.split("/")[1]
    assert cpu == cuda == [f"{name}_workspace", *re.findall(rf"\bFN\((\w+), {name}\)", CONTRACT)]


@each_op
def test_a_hot_file_reads_top_down(op):
    """Types, maths, contract, in the way cpu/each_dtype.h says and compilers and editors see."""
    text = (ROOT / f"cpu/{op}.c").read_text()
    steps = ('#include "cpu.h"\n', "#ifndef T ", f'#define THIS_FILE "{op}.c"\n', '#include "each_dtype.h"\n#endif ',
             "#ifdef LAST_T ")
    places = [text.find("\n" + step) for step in steps]
    assert not [step for step, place in zip(steps, places) if place < 0]
    assert places == sorted(places)


def test_no_source_is_left_out_of_the_build():
    named = {*re.findall(r"\b[\w/]+\.cu?\b", CMAKE), *(f"{d}/{op}.{s}" for op in OPS for d, s in
                                                       (("shim", "c"), ("cpu", "c"), ("cuda", "cu")))}
    there = {str(path.relative_to(ROOT)) for d in ("shim", "cpu", "cuda") for s in ("c", "cu")
             for path in (ROOT / d).rglob(f"*.{s}")}
    assert there == {name for name in named if name.split("/")[0] in ("shim", "cpu", "cuda")}


# ------------------------------------------------------------------------------------------------------- arguments


def fake_of(name):
    for op in OPS:
        importlib.import_module(f"torch_subspace.{op.replace('/', '.')}")  # families are lazy
    kernel = torch._library.simple_registry.singleton.find(f"torch_subspace::{name}").fake_impl.kernel
    assert kernel is not None, f"{name} has no fake kernel"
    return inspect.getclosurevars(kernel.func).nonlocals.get("func", kernel.func)  # torch wraps it


@pytest.mark.parametrize("name", REGISTERED)
def test_a_schema_and_its_fake_kernel_name_the_same_arguments(name):
    schema = getattr(torch.ops.torch_subspace, name).default._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(fake_of(name)).parameters)


def shim_functions():
    """(schema, body) of every OP in the shims; a body that only passes the stack on is that function's."""
    found = {}
    for text in SHIMS.values():
        parts = re.split(r"^OP\(", text, flags=re.M)
        for part in parts[1:]:
            head, body = part.split("{", 1)
            schema = "".join(re.findall(r'"([^"]*)"', head))
            body = body.split("\n}\n")[0]
            if passed := re.match(r"\s*(\w+)\(stack, \w+\);$", body):
                body = re.search(rf"\b{passed[1]}\(StableIValue \*stack.*?\n}}\n", text, re.S).group()
            found[schema.split("(")[0]] = schema, body
    return found


@pytest.mark.parametrize("name", REGISTERED)
def test_a_shim_takes_its_arguments_in_the_schemas_order(name):
    """stack[i] goes to something that bears the name of the schema's argument i."""
    schema, body = shim_functions()[name]
    arguments = [a.name for a in torch._C.parse_schema(f"torch_subspace::{schema}").arguments]
    for i, argument in enumerate(arguments):
        uses = [use for use in re.split(r"[;{]|,\s+(?=\.|\w+ = )", body) if f"stack[{i}]" in use]
        assert uses, f"{name}: {argument}, stack[{i}], is never taken"
        assert all(re.search(rf"\b{argument}\b", use) for use in uses), f"{name}: stack[{i}] is {argument}, not {uses}"


def test_retractions_stand_in_the_order_of_the_contract():
    names = re.search(r"typedef enum subspace_retraction \{(.*?)\}", CONTRACT, re.S).group(1)
    assert [n.lower() for n in re.findall(r"SUBSPACE_(\w+)", names)] == list(RETRACTIONS)


# -------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("folder", ["cpu", "cuda", "shim"])
def test_no_family_includes_anothers_files(folder):
    own = {path.name: path.parent.name for f in FAMILIES for path in (ROOT / folder / f).glob("*.*h")}
    wrong = []
    for family in FAMILIES:
        for path in (ROOT / folder / family).iterdir():
            for name in re.findall(r'#include "(?:\w+/)?([\w.]+)"', path.read_text()):
                if own.get(name, family) != family:
                    wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not wrong


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_a_header_knows_who_includes_it(folder):
    """Where its head comment names them; what all may include names nobody."""
    texts = {path.name: path.read_text() for path in sorted((ROOT / folder).rglob("*.*")) if path.suffix[1:] in
             ("c", "h", "cu", "cuh")}
    checked = 0
    for name, text in texts.items():
        head = " ".join(text.split("*/")[0].replace("\n *", " ").split())
        named = re.search(r"\bIncluded (?:once per precision,? )?by ((?:[\w.]+\.(?:cuh?|[ch])\b(?:,| and)? ?)+)", head)
        if named:
            who = {n for n, t in texts.items() if f'#include "{name}"' in t}
            assert set(re.findall(r"\w+\.\w+", named[1])) == who, name
            checked += 1
    assert checked > 8


def test_kernels_include_nothing_of_the_shim_but_the_contract():
    headers = {path.name for path in (ROOT / "shim").glob("*.h")}
    sources = [p for d in ("cpu", "cuda") for p in (ROOT / d).rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh")]
    assert len(sources) > 50
    assert not [p for p in sources if headers & set(re.findall(r'#include "([\w.]+)"', p.read_text()))]


def imports(path):
    """(module, name) of the package's own imports in a file, absolute."""
    package = ["torch_subspace", *path.relative_to(ROOT / "ops").parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def test_families_import_only_public_names_of_one_another():
    folders = {path.name for path in (ROOT / "ops").iterdir() if (path / "__init__.py").exists()}
    assert set(FAMILIES) <= folders
    wrong = []
    for path in sorted((ROOT / "ops").glob("*/*.py")):
        for module, name in imports(path):
            part = module.split(".")[1] if "." in module else name
            if part in folders and part != path.parent.name and name not in ts.__all__:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}.{name}")
    assert not wrong


@pytest.mark.parametrize("family", sorted(path.parent.name for path in (ROOT / "ops").glob("*/__init__.py")
                                          if "lazy(__name__, _FILES)" in path.read_text()))
def test_a_lazy_familys_three_lists_are_one(family):
    """What type checkers read, what is imported on first use, and `__all__`."""
    path = ROOT / "ops" / family / "__init__.py"
    module = importlib.import_module(f"torch_subspace.{family}")
    typed = {name: origin.removeprefix(f"torch_subspace.{family}.") for origin, name in imports(path)
             if origin.startswith(f"torch_subspace.{family}.")}
    assert typed == module._FILES and sorted(module.__all__) == sorted(module._FILES)


# ----------------------------------------------------------------------------------------------------------- globs


def in_tree(*suffixes):
    """Files with these suffixes that git knows or would take; all that are there, where there is no git."""
    if (ROOT / ".git").exists():
        names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE,
                               text=True, check=True).stdout.split()
    else:
        names = [str(p.relative_to(ROOT)) for d in ("cpu", "cuda", "shim", "examples", "tests")
                 for p in (ROOT / d).rglob("*")]
    return {name for name in names if name.endswith(suffixes) and (ROOT / name).exists()}


def test_lint_sees_every_file_of_c():
    seen = subprocess.run(["make", "-s", "--no-print-directory", "c-files"], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
    assert set(seen.split()) == in_tree(".c", ".h", ".cu", ".cuh", ".cpp")
