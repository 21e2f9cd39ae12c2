"""Rows of every processor that has run an op: results/<op>.json is the newest run, results/<processor>/<op>.json the
newest on each other one. `keep` makes room for a new run, `table` shows them side by side."""

import json
import re
from pathlib import Path

import gpu_table

RESULTS = Path(__file__).resolve().parent / "results"


def name(where):
    """A folder's name for the processor of a run: its own words, its family, and the instruction set."""
    words = re.sub(r"\((r|tm)\)|@.*|\b(processor|cpu)\b", " ", where["cpu"].lower())
    family = [where["family"]] if where.get("family") else []
    return "-".join([*re.findall(r"[a-z0-9]+", words), *family, where["instruction set"]])


def title(where):
    """The same for readers."""
    words = re.sub(r"\((R|TM)\)|@.*|\b(Processor|CPU)\b", " ", where["cpu"])
    family = f" (family {where['family']})" if where.get("family") else ""
    return f"{' '.join(words.split())}{family}, {where['instruction set']}"


def keep(results, op, where):
    """Move away the rows of another processor before this one's are written, whose older rows go."""
    newest, here = results / f"{op}.json", results / name(where) / f"{op}.json"
    if newest.exists():
        other = name(json.loads(newest.read_text())["environment"])
        if other != name(where):
            (results / other).mkdir(exist_ok=True)
            newest.rename(results / other / newest.name)
    here.unlink(missing_ok=True)


def runs(op, results=RESULTS):
    """All runs of an op, one a processor, by its title."""
    paths = sorted([*results.glob(f"{op}.json"), *results.glob(f"*/{op}.json")])
    found = [json.loads(path.read_text()) for path in paths]
    return {title(run["environment"]): run for run in found}


def cells(run, case, ours):
    """Our time, what the fastest other takes of it, and the share of the machine's limit."""
    rows = [row for row in run["rows"] if row["case"] == case] if run else []
    mine = next((row for row in rows if row["contender"] == ours and "p50_ms" in row), None)
    if not mine:
        return ["", "", ""]
    other = gpu_table.best_other(rows, case)
    share = mine.get("of_bound") if case in run.get("work", ()) else None  # before it was kept, work was told otherwise
    threads = run["environment"]["threads"]
    return [f"{mine['p50_ms']:.4g} ms, {threads} thread{'s' * (threads > 1)}",
            f"{other['p50_ms'] / mine['p50_ms']:.2f} × {other['contender']}" if other else "",
            f"{share:.0%}" if share else ""]


def held_back(run):
    """Whether OpenBLAS, whose products are the limit, was held to kernels of AVX2 on a processor that has more."""
    where = run["environment"]
    return where["instruction set"].startswith(("avx512", "amx")) and "Haswell" in where.get("blas", "")


def table(shown, place, results=RESULTS):
    """The first case of every op in `shown`, three columns a processor; `place` tells of a run."""
    found = {op: runs(op, results) for op in shown}
    titles = sorted({word for by in found.values() for word in by})
    lines = ["| op, size | " + " | ".join(f"{word} | fastest other | of its limit" for word in titles) + " |",
             "|---" * (1 + 3 * len(titles)) + "|"]
    for op, ((case, ours, _), *_) in shown.items():
        row = [cell for word in titles for cell in cells(found[op].get(word), case, ours)]
        lines.append(f"| `{op}` {case.replace(' float32', '')} | {' | '.join(row)} |")
    places = {}
    for op, by in found.items():
        for run in by.values():
            if (results / name(run["environment"]) / f"{op}.json").exists():
                places.setdefault(place(run["environment"]), []).append(f"`{op}`")
    lines += ["", "Limit: the longer of bytes over bandwidth and flops over the rate of matrix products, torch's or "
              "OpenBLAS's, the higher one, measured beside the row (`tests/bench/work.py`). Rows that are not those of "
              "the first table"
              f"{':' if places else ': none.'}"]
    slow = sorted({f"`{op}`" for op, by in found.items() for run in by.values() if held_back(run)})
    if slow:
        lines += ["", f"In some rows with AVX-512, of {', '.join(slow)}, OpenBLAS was held to kernels of AVX2 by "
                  "OPENBLAS_CORETYPE: the limit is higher than they say, up to twice, and so are the rates of ops that "
                  "use its products."]
    lines += ["", *(f"* {', '.join(ops)}: {told}" for told, ops in places.items())] if places else []
    return "\n".join(lines)
