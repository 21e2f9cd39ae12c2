"""Cluster handwritten digits without their labels, and compare with scikit-learn's algorithms.

scikit-learn's digits (1797 real images of 8 x 8 pixels, bundled with it): two thirds are clustered, the last third is
held out and assigned to the clusters that were found. Labels only measure, at the end. All algorithms are told that
there are ten clusters; ManifoldClustering also knows that the points are images, and its defaults, the same for every
seed, were settled on these very images: the held-out third tells of new points, not of new kinds of data.

    python examples/cluster.py
    python examples/cluster.py --seeds 1 --epochs 20      # a look, in seconds
"""

import argparse
import time
from pathlib import Path

import cluster_report as report
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans, SpectralClustering
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import torch_subspace as ts
from torch_subspace.metrics import clustering_scores

CLASSES, SIZE = 10, (8, 8)
OURS = "ManifoldClustering"


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs per algorithm (default: 5)")
    parser.add_argument("--init-epochs", type=int, help="passes that spread the features (default: the estimator's)")
    parser.add_argument("--epochs", type=int, help="passes that form the clusters (default: the estimator's)")
    build = Path(__file__).resolve().parents[1] / "build"
    parser.add_argument("--output", type=Path, default=build / "cluster.png", help="the picture; numbers beside it")
    return parser.parse_args()


def ours(seed, args):
    """The estimator of this package; only the number of epochs can be changed from the command line."""
    given = {"init_epochs": args.init_epochs, "epochs": args.epochs}
    given = {name: value for name, value in given.items() if value is not None}
    return ts.ManifoldClustering(CLASSES, augment="images", image_shape=SIZE, random_state=seed, **given)


def estimators(seed, args):
    """Every algorithm's estimator, for a seed. Ward's has none and runs once."""
    found = {
        "k-means": KMeans(CLASSES, n_init=10, random_state=seed),
        "Gaussian mixture": GaussianMixture(CLASSES, covariance_type="tied", n_init=3, random_state=seed),
        "spectral": SpectralClustering(CLASSES, affinity="nearest_neighbors", random_state=seed),
        "Ward": AgglomerativeClustering(CLASSES, linkage="ward"),
        OURS: ours(seed, args),
    }
    return {name: model for name, model in found.items() if seed == 0 or name != "Ward"}


def run(model, train, held_out):
    """Scores on the clustered images and, where the algorithm can say, on those it has not seen; processor seconds."""
    start = time.process_time()
    labels = model.fit_predict(train[0])
    seconds = time.process_time() - start
    result = {"train": clustering_scores(train[1], labels), "seconds": seconds, "labels": labels}
    if hasattr(model, "predict"):
        result["held-out"] = clustering_scores(held_out[1], model.predict(held_out[0]))
    return result


def main():
    """Run every algorithm, then tabulate and draw."""
    args = arguments()
    x, y = load_digits(return_X_y=True)
    x = x.astype("float32")
    parts = train_test_split(x, y, test_size=1 / 3, stratify=y, random_state=0)
    train, held_out = (parts[0], parts[2]), (parts[1], parts[3])

    runs, models = {}, []
    jobs = [(seed, name, model) for seed in range(args.seeds) for name, model in estimators(seed, args).items()]
    for seed, name, model in (progress := tqdm(jobs, unit="run", dynamic_ncols=True)):
        progress.set_description(f"{name}, seed {seed}")
        runs.setdefault(name, []).append(run(model, train, held_out))
        if name == OURS:
            models.append(model)
    rows = report.summary(runs)
    report.print_table(rows)

    middle = report.median_run(runs[OURS])
    model = models[middle]
    blank = ours(middle, args).set_params(init_epochs=0, epochs=0).fit(train[0])
    features = {"before training": blank.transform(train[0]), "after": model.transform(train[0])}
    report.print_geometry(features, model.labels_)
    setting = {k: v for k, v in model.get_params().items() if k not in ("encoder", "callbacks", "random_state")}
    setting |= {"images": len(train[1]), "held_out": len(held_out[1]), "seeds": args.seeds}
    setting |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    report.write(args.output, rows, features, train[1], model.labels_, setting)


if __name__ == "__main__":
    main()
