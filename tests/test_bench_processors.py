"""tests/bench/processors.py: rows of several processors on runs made up here."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("bench")))
import processors  # noqa: E402

INTEL = {"cpu": "Intel(R) Xeon(R) Processor @ 2.10GHz", "instruction set": "avx512", "threads": 2}
AMD = {"cpu": "AMD EPYC", "instruction set": "avx512", "threads": 1}


def write(folder, where, ms, **more):
    processors.keep(folder, "op", where)
    rows = [{"case": "big", "contender": "ours", "p50_ms": ms, "of_bound": 0.5},
            {"case": "big", "contender": "eager", "p50_ms": 3 * ms}]
    (folder / "op.json").write_text(json.dumps({"environment": where, "rows": rows, **more}))


def files(folder):
    return {str(path.relative_to(folder)): json.loads(path.read_text())["rows"][0]["p50_ms"]
            for path in folder.rglob("*.json")}


def test_names():
    assert processors.name(INTEL) == "intel-xeon-avx512" and processors.title(INTEL) == "Intel Xeon, avx512"
    assert processors.name(AMD) == "amd-epyc-avx512" and processors.title(AMD) == "AMD EPYC, avx512"
    told = AMD | {"family": "26"}
    assert processors.name(told) == "amd-epyc-26-avx512" and processors.title(told) == "AMD EPYC (family 26), avx512"


def test_rows_with_openblas_held_back_are_named(tmp_path):
    shown = {"op": [("big", "ours", ())]}
    for blas, named in (("OpenBLAS 0.3 Haswell", True), ("OpenBLAS 0.3 SkylakeX", False)):
        write(tmp_path, AMD | {"blas": blas}, 2)
        assert ("held to kernels of AVX2" in processors.table(shown, lambda where: "", tmp_path)) == named


def test_the_newest_of_each_processor_is_kept(tmp_path):
    for where, ms, left in ((INTEL, 1, {"op.json": 1}), (INTEL, 2, {"op.json": 2}),
                            (AMD, 3, {"op.json": 3, "intel-xeon-avx512/op.json": 2}),
                            (AMD, 4, {"op.json": 4, "intel-xeon-avx512/op.json": 2}),
                            (INTEL, 5, {"op.json": 5, "amd-epyc-avx512/op.json": 4})):
        write(tmp_path, where, ms)
        assert files(tmp_path) == left


def test_side_by_side(tmp_path):
    shown = {"op": [("big", "ours", ())], "other": [("big", "ours", ())]}
    write(tmp_path, INTEL, 2)
    write(tmp_path, AMD, 10, work={"big": {"bytes": 1, "flops": 1}})
    (tmp_path / "other.json").write_text(json.dumps({"environment": AMD, "rows": []}))
    lines = processors.table(shown, lambda where: where["cpu"], tmp_path).splitlines()
    assert lines[0].startswith("| op, size | AMD EPYC, avx512 | ") and "| Intel Xeon, avx512 |" in lines[0]
    assert lines[2] == ("| `op` big | 10 ms, 1 thread | 3.00 × eager | 50% | 2 ms, 2 threads | 3.00 × eager |  |")
    assert lines[3].count("|") == lines[0].count("|") and lines[-1] == f"* `op`: {INTEL['cpu']}"
