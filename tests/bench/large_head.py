"""Making and swapping a head of ImageNet-21k's classes, beside torch.randn of as many numbers; printed, a minute.

    python tests/bench/large_head.py
"""

import statistics
import time

import torch

import torch_subspace as ts

CLASSES, K, FEATURES = 21841, 8, 768


def main():
    """Processor seconds of one thread, by turns."""
    torch.set_num_threads(1)
    ways = {
        "torch.randn": lambda model: torch.randn(CLASSES, K, FEATURES),
        "GrassmannLinear": lambda model: ts.GrassmannLinear(FEATURES, CLASSES, K),
        "swap_head": lambda model: ts.swap_head(model, subspace_dim=K, name="1"),
    }
    taken = {name: [] for name in ways}
    for _ in range(7):
        for name, way in ways.items():
            model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(FEATURES, CLASSES))
            start = time.process_time()
            way(model)
            taken[name].append(time.process_time() - start)
    least = statistics.median(taken["torch.randn"])
    for name, seconds in taken.items():
        print(f"{name:<16} {statistics.median(seconds):5.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
              f"{statistics.median(seconds) / least:.2f} times torch.randn")


if __name__ == "__main__":
    main()
