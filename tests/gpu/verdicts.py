"""What came of a stage of quick.py, from (exit code or None where it was stopped, folder, its log's text)."""

import json
import re

import outcomes


def last_line(text, without=r"make\S*[:[]|\d+ s$|$"):
    """The last that says something, an error before others."""
    lines = [line.strip()[:200] for line in text.splitlines() if not re.match(without, line.strip())]
    errors = [line for line in lines if re.search(r"\b(error|fatal|Error):", line)]
    return (errors or lines or ["no output"])[-1]


def by_code(code, folder, text):
    """Of a program whose exit status tells all."""
    return {0: "passed", None: "stopped"}.get(code, "failed"), last_line(text)


def judge_machine(code, folder, text):
    """What it prints is in the summary's second line."""
    return by_code(code, folder, text)[0], ""


def judge_tests(which, code, folder, text):
    """From the outcomes; pytest's own exit status tells only whether it began."""
    names, found = outcomes.read(folder / f"{which}.jsonl")
    count = {word: sum(found.get(name) == word for name in names) for word in ("passed", "failed", "skipped")}
    left = sum(name not in found for name in names)
    words = f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped, {left} not reached"
    if not names:
        return ("stopped" if code is None else "failed"), f"no test was collected: {last_line(text)}"
    if count["failed"] or code not in (0, 1, 5, None):
        return "failed", words
    if left:
        return "stopped", words
    return ("passed" if count["passed"] else "skipped"), words


def judge_tool(code, folder, text):
    """The last line of sanitize.py."""
    told = re.findall(r"^(?:\w+check: )?(passed|skipped|failed|stopped): (.*)", text, re.M)
    if code is None or not told:
        return ("stopped" if code is None else "failed"), last_line(text)
    return told[-1]


def all_tests(folder):
    """Names and outcomes of all stages."""
    both = [outcomes.read(folder / f"{which}.jsonl") for which in ("tests", "memory")]
    return both[0][0] + both[1][0], both[0][1] | both[1][1]


def rows_of(folder):
    """(op, case) of the rows that were to be measured, of those whose own contenders have times, and of those that
    have none, with a reason."""
    plan = folder / "plan.json"
    planned = [tuple(pair) for pair in json.loads(plan.read_text())] if plan.exists() else []
    there, wrong = set(), {}
    for path in sorted(folder.glob("*_cuda.json")):
        op = path.stem.removesuffix("_cuda")
        for row in json.loads(path.read_text())["rows"]:
            if row["contender"].startswith("ours"):
                there.add((op, row["case"]))
                if "missing" in row:
                    wrong[op, row["case"]] = f"{row['contender']}: {row['missing']}"
    return planned, there, wrong


def judge_bench(code, folder, text):
    """From the rows that were written."""
    if "there is no GPU" in text:
        return "skipped", last_line(text)
    planned, there, wrong = rows_of(folder / "bench")
    left = [pair for pair in planned if pair not in there]
    words = f"{len(there)} of {len(planned)} rows, {len(wrong)} of them without our time"
    if wrong or not planned or code not in (0, None):
        return "failed", words if planned else last_line(text)
    return ("stopped" if left else "passed"), words
