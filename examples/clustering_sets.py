"""Clusterings of eight sets of points by ManifoldClustering and by scikit-learn's algorithms, told how many there are.

    apt install fonts-arphic-gbsn00lp fonts-arphic-gkai00mp fonts-arphic-ukai fonts-arphic-uming fonts-wqy-microhei \
        fonts-wqy-zenhei fonts-droid-fallback
    python examples/clustering_sets.py
    python examples/clustering_sets.py --quick            # a look, in seconds

ManifoldClustering has the same settings everywhere, its defaults, none of which was chosen on these sets; where points
are images it runs a second time, told so. The others have scikit-learn's usual settings (`algorithms`). Two thirds of a
set are clustered, the last third is only predicted, by those that can; splits are the same for all, another for each
seed. Labels only measure, at the end. What has been measured is kept beside the script and is not measured again as
long as settings and points are the same: `--output new.json` begins anew.
"""

import argparse
import hashlib
import json
import time
import warnings
from pathlib import Path

import clustering_report as report
import numpy as np
import torch
from clustering_data import SETS
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, KMeans, SpectralClustering
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import torch_subspace as ts
from torch_subspace.metrics import clustering_scores

QUICK = ("iris", "subspaces")


class MixtureByBIC:
    """Gaussian mixture with the kind of covariance that the Bayesian information criterion prefers."""

    def __init__(self, clusters, seed):
        self.clusters, self.seed = clusters, seed

    def get_params(self):
        return vars(self)

    def fit_predict(self, x):
        found = [GaussianMixture(self.clusters, covariance_type=kind, random_state=self.seed).fit(x)
                 for kind in ("full", "tied", "diag", "spherical")]
        self.predict = min(found, key=lambda mixture: mixture.bic(x)).predict
        return self.predict(x)


def algorithms(clusters, seed, images, quick):
    """Every algorithm's estimator, by its name."""
    few = {"init_epochs": 5, "epochs": 5} if quick else {}
    found = {
        "k-means": KMeans(clusters, n_init=10, random_state=seed),
        "Gaussian mixture": MixtureByBIC(clusters, seed),
        "spectral": SpectralClustering(clusters, affinity="nearest_neighbors", random_state=seed),
        "Ward": AgglomerativeClustering(clusters),
        "HDBSCAN": HDBSCAN(copy=True),
        "ours": ts.ManifoldClustering(clusters, random_state=seed, **few),
    }
    if images:
        found["ours, images"] = ts.ManifoldClustering(clusters, random_state=seed, **few, **images)
    return found


def fingerprint(model, x):
    """Of settings and points, these to a 64th: other roundings are no other points."""
    settings = {k: str(v) for k, v in sorted(model.get_params().items())}
    told = json.dumps([type(model).__name__, settings, x.shape]).encode()
    return hashlib.sha256(told + np.round(64 * x).astype("int32").tobytes()).hexdigest()[:16]


def run(model, train, held_out):
    """Scores on the clustered points and, where the algorithm can say, on those it has not seen; processor seconds."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of spectral clustering on graphs in several parts: scores tell
        labels = model.fit_predict(train[0])
    result = {"seconds": time.process_time() - start, **clustering_scores(train[1], labels)}
    if hasattr(model, "predict"):
        result["held-out"] = clustering_scores(held_out[1], model.predict(held_out[0]))["acc"]
    return result


def measure(name, seed, rows, quick, told):
    """Yield the rows of a set and a seed, those there are already or new ones."""
    points = SETS[name]
    x, y = points.draw(seed)
    parts = train_test_split(x, y, test_size=1 / 3, stratify=y, random_state=seed)
    train, held_out = (parts[0], parts[2]), (parts[1], parts[3])
    clusters = len(np.unique(y))
    for algorithm, model in algorithms(clusters, seed, points.images, quick).items():
        about = {"set": name, "seed": seed, "algorithm": algorithm, "key": fingerprint(model, x)}
        known = next((row for row in rows if about.items() <= row.items()), None)
        told(f"{name}, seed {seed}: {algorithm}")
        yield known or about | {"points": len(train[1]), "held out": len(held_out[1]), "features": x.shape[1],
                                "classes": clusters} | run(model, train, held_out)


def main(given=None):
    """Measure what has not been measured, then tabulate and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, help="only these (default: all that can be had here)")
    parser.add_argument("--quick", action="store_true", help="two sets, one seed, few epochs, into build/")
    parser.add_argument("--output", type=Path, help="the numbers, and the picture beside them")
    args = parser.parse_args(given)
    here = Path(__file__).resolve()
    path = args.output or (here.parents[1] / "build" / here.name if args.quick else here).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = {(row["set"], row["seed"], row["algorithm"]): row for row in before["rows"]}
    setting = {"torch": torch.__version__, "threads": 1}
    for name in args.sets or (QUICK if args.quick else SETS):
        if SETS[name].missing and (why := SETS[name].missing()):
            print(f"{SETS[name].title} left out: {why}")
            continue
        old = {place for place in rows if place[0] == name}
        with tqdm(range(1 if args.quick else SETS[name].seeds), unit="seed", dynamic_ncols=True) as progress:
            for seed in progress:
                for row in measure(name, seed, before["rows"], args.quick, progress.set_description):
                    place = name, seed, row["algorithm"]
                    rows[place] = row
                    old.discard(place)
                    report.keep(path, before | {"setting": setting, "rows": list(rows.values())})
        for place in old:  # of more seeds, or of an algorithm that is no more
            del rows[place]
    rows = sorted(rows.values(), key=lambda row: (list(SETS).index(row["set"]), row["seed"]))
    summary = report.summary(rows, {name: points.title for name, points in SETS.items()})
    report.keep(path, {"setting": setting, "sets": summary, "rows": rows})
    report.print_table(summary)
    report.draw(path.with_suffix(".png"), summary)
    print(f"picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
