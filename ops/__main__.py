"""`python -m torch_subspace`: the configuration, a self-test of every op, and with --bench what they take here."""

import argparse
import sys

from . import selftest
from .library import config, show_config


def main() -> int:
    """What the command line asks for; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_subspace",
        description="Print what is loaded, and hold every op's value and gradient against a plain float64 formula.",
        epilog="Exit status: 0 all ops are right, 1 some are not, 2 the libraries or the device can't be used.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="this one only; by default all that are present")
    parser.add_argument("--bench", action="store_true", help="also time small cases against torch's formula")
    args = parser.parse_args()
    show_config()
    present = selftest.devices()
    if args.device and args.device not in present:
        print(f"there is no {args.device}: {config()['CUDA'].get('why not', 'torch sees no GPU')}", file=sys.stderr)
        return 2
    chosen = [args.device] if args.device else present
    print()
    failed = {device: names for device in chosen if (names := selftest.run(device))}
    for device, names in failed.items():
        print(f"FAILED on {device}: {', '.join(names)}")
    if not failed:
        print(f"all {len(selftest.ROWS)} ops are right on {' and '.join(chosen)}")
    if args.bench:
        for device in chosen:
            selftest.bench(device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
