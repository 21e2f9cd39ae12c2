"""Measure everything that docs/evidence.md and the other pages show of accuracy, two scripts at a time.

    python examples/evidence.py                # all of it, into build/evidence; then examples/ and docs/ are renewed
    python examples/evidence.py --quick        # does each script run? A few minutes, into build/evidence-quick only

Stopped and started again it goes on: what is done is not done again, and the longest scripts go on where they were.
Numbers and pictures go to examples/ and tables into the pages only when all have ended well; `git diff` then says what
has changed. `--only` names some of the scripts.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
SCRIPTS = {  # what it writes, the other file beside it: the script and its arguments; those that make it quick
    "finetune_text.json": ("finetune_text.py --jobs {jobs}", "--quick"),
    "finetune_memory.json": ("finetune_memory.py", "--quick"),
    "gamma.json": ("gamma.py", "--quick"),
    "many_classes.json": ("many_classes.py", "--quick"),
    "clustering_sets.json": ("clustering_sets.py", "--quick"),
    "mcr2.json": ("mcr2.py", "--seeds 1"),
    "finetune_glyphs.png": ("finetune.py --glyphs", "--seeds 1 --epochs 1"),
    "finetune.png": ("finetune.py", "--seeds 1 --epochs 1"),
    "swap_head.png": ("swap_head.py", "--seeds 1 --epochs 1 --size 16"),
    "cluster.png": ("cluster.py", "--seeds 1 --init-epochs 2 --epochs 2"),
    "represent.png": ("represent.py", "--seeds 1"),
    "denoise.png": ("denoise.py", "--seeds 1"),
    "phase_transition.png": ("phase_transition.py", "--sets 1 --unions 2 --starts 5"),
    "patching.png": ("patching.py", "--seeds 1 --steps 20"),
    "retrieve.json": ("retrieve.py", "--seeds 1 --epochs 6"),
    "compatible.png": ("compatible.py", "--seeds 1 --steps 50"),
    "singular_values.json": ("singular_values.py", "--seeds 2"),
    "lejepa.png": ("lejepa.py", "--seeds 1 --epochs 10"),
    "four_losses.png": ("four_losses.py", "--seeds 1 --steps 20 --draws 4"),
    "projectors.json": ("projectors.py", "--seeds 1 --steps 5"),
    "intrinsic_dimension.png": ("intrinsic_dimension.py", "--seeds 1 --epochs 2"),
}


def run(name, folder, quick, jobs):
    """One script, unless it has been done; what it prints goes to a file. Whether it ended well."""
    done, begun = folder / f"{name}.done", time.monotonic()
    if not done.exists():
        command, fast = SCRIPTS[name]
        script, *options = command.format(jobs=jobs).split() + (fast.split() if quick else [])
        with (folder / f"{name}.log").open("w") as log:
            command = [sys.executable, EXAMPLES / script, *options, "--output", folder / name]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            _, ended, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(ended)
        if ended == 0:
            spent = usage.ru_utime + usage.ru_stime  # since it was started last
            done.write_text(f"{time.monotonic() - begun:.0f} s, of a processor {spent:.0f}\n")
    return done.exists()


def main():
    """Run what has not been done, then renew the files that show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a little of each script")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at a time, a processor each (default: 2)")
    args = parser.parse_args()
    folder = ROOT / "build" / ("evidence-quick" if args.quick else "evidence")
    folder.mkdir(parents=True, exist_ok=True)
    failed, begun = [], time.monotonic()
    together = [name for name in args.only if "{jobs}" in SCRIPTS[name][0]]  # these share all processors out themselves
    with tqdm(desc="evidence", total=len(args.only), unit="script", dynamic_ncols=True) as progress:
        for names, at_once in ((together, 1), ([name for name in args.only if name not in together], args.jobs)):
            with ThreadPoolExecutor(at_once) as pool:
                runs = {pool.submit(run, name, folder, args.quick, args.jobs): name for name in names}
                for ended in as_completed(runs):
                    name = runs[ended]
                    if ended.result():
                        progress.write(f"{name}: {(folder / f'{name}.done').read_text().strip()}")
                    else:
                        failed.append(folder / f"{name}.log")
                        progress.write(f"failed: {failed[-1]}")
                    progress.update()
    tqdm.write(f"this time: {time.monotonic() - begun:.0f} s")
    if failed:
        sys.exit(f"{len(failed)} of {len(args.only)} scripts failed")
    if args.quick:
        return
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.png")):
        shutil.copy(path, EXAMPLES)
    subprocess.run([sys.executable, ROOT / "tests/bench/readme.py"], check=True)


if __name__ == "__main__":
    main()
