"""ManifoldClustering: what it finds, scikit-learn's conventions, reproducibility, errors and files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import torch_subspace as ts
from torch_subspace.clustering.augment import ImageAugment, Noise
from torch_subspace.metrics import clustering_accuracy

QUICK = {"n_clusters": 3, "hidden": (32,), "dim": 8, "views": 2, "init_epochs": 15, "epochs": 10, "random_state": 0}


def subspaces(n=60, clusters=3, dim=2, features=12, seed=0):
    """n points on each of some random subspaces, and the labels, mixed."""
    g = torch.Generator().manual_seed(seed)
    frames = torch.linalg.qr(torch.randn(clusters, features, dim, generator=g)).Q
    x = torch.nn.functional.normalize(torch.randn(clusters, n, dim, generator=g), dim=-1) @ frames.mT
    order = torch.randperm(clusters * n, generator=g)
    return x.reshape(-1, features)[order].numpy(), torch.arange(clusters).repeat_interleave(n)[order].numpy()


@pytest.fixture(scope="module")
def fitted():
    X, y = make_blobs(150, 6, centers=3, random_state=1)
    X = X.astype(np.float32)
    return ts.ManifoldClustering(**QUICK).fit(X), X, y


class TestFinds:
    def test_blobs(self, fitted):
        model, X, y = fitted
        assert clustering_accuracy(y, model.labels_) > 0.98
        assert clustering_accuracy(y, model.predict(X)) > 0.98

    def test_more_points_than_the_readout_takes(self):
        X, y = make_blobs(300, 6, centers=3, random_state=2)
        model = ts.ManifoldClustering(**QUICK | {"readout_size": 60, "batch_size": 80}).fit(X)
        assert clustering_accuracy(y, model.labels_) > 0.98

    def test_unseen_points(self):
        X, y = make_blobs(300, 6, centers=3, random_state=3)
        model = ts.ManifoldClustering(**QUICK).fit(X[:150])
        assert clustering_accuracy(y[150:], model.predict(X[150:])) > 0.98

    def test_a_number_of_its_own(self, tmp_path):
        X, y = subspaces(clusters=4, features=16)
        model = ts.ManifoldClustering(None, hidden=(64,), views=2, random_state=0).fit(X)
        assert model.n_clusters_ == 4 == len(set(model.labels_))
        assert clustering_accuracy(y, model.labels_) > 0.95
        model.save(tmp_path / "a.safetensors")
        again = ts.ManifoldClustering.load(tmp_path / "a.safetensors")
        assert again.n_clusters is None and again.n_clusters_ == 4
        assert np.array_equal(again.predict(X), model.predict(X))

    def test_one_point_over_and_over_is_one_cluster(self):
        model = ts.ManifoldClustering(**QUICK | {"n_clusters": None}).fit(np.ones((9, 3)) * np.eye(9, 1))
        assert model.n_clusters_ <= 2

    def test_one_cluster(self):
        X, _ = subspaces()
        model = ts.ManifoldClustering(**QUICK | {"n_clusters": 1}).fit(X)
        assert not model.labels_.any() and not model.predict(X).any()

    def test_training_raises_the_rate_and_lowers_the_loss(self, fitted):
        model = fitted[0]
        phases = [[r for r in model.history_ if r["phase"] == phase] for phase in ("rate", "clusters")]
        assert [len(p) for p in phases] == [15, 10]
        for records in phases:
            assert records[-1]["loss"] < records[0]["loss"]
            assert [r["epoch"] for r in records] == list(range(len(records)))
            assert all(1 <= r["effective_rank"] <= 8 for r in records)


class TestMembership:
    def test_prediction_is_the_plan_extended(self, fitted):
        # A training point's row of the plan, summed by cluster: the very numbers that predict takes the largest of.
        model, X, _ = fitted
        c = model._embed(model._scaled(X))[1]
        with torch.no_grad():
            anchors = model._anchors
            plan = ts.sinkhorn((anchors @ anchors.mT).abs(), eta=model.eta)
            found = model._belonging(anchors)
        member = torch.nn.functional.one_hot(model._anchor_labels, 3).float()
        assert torch.allclose(found, plan @ member, atol=1e-4)
        assert torch.allclose(model._belonging(c).sum(1), torch.ones(len(X)), atol=1e-5)


# What is left out: nothing. Checks that fit on tiny data need no long training.
@parametrize_with_checks([ts.ManifoldClustering(hidden=(16,), dim=8, views=2, init_epochs=20, epochs=10)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


class TestManners:
    def test_constructor_only_stores(self):
        hidden, encoder = [3], nn.Linear(2, 2)
        model = ts.ManifoldClustering(-7, hidden=hidden, encoder=encoder)
        assert model.n_clusters == -7 and model.hidden is hidden and model.encoder is encoder
        assert set(vars(model)) == set(model.get_params(deep=False))

    def test_clone_of_a_fitted_one_is_not_fitted(self, fitted):
        with pytest.raises(NotFittedError):
            clone(fitted[0]).predict(fitted[1])

    def test_pipeline(self):
        X, y = make_blobs(90, 4, centers=3, random_state=1)
        pipe = make_pipeline(StandardScaler(), ts.ManifoldClustering(**QUICK))
        assert clustering_accuracy(y, pipe.fit_predict(X)) > 0.95
        assert pipe.transform(X).shape == (90, 8)
        assert pipe.get_feature_names_out()[0] == "manifoldclustering0"
        pipe.set_params(manifoldclustering__n_clusters=2)
        assert len(np.unique(pipe.fit_predict(X))) == 2

    def test_features_are_unit_rows(self, fitted):
        Z = fitted[0].transform(fitted[1])
        assert Z.dtype == np.float32
        assert np.allclose(np.linalg.norm(Z, axis=1), 1, atol=1e-5)

    def test_fit_predict_and_fit_transform(self, fitted):
        model, X, _ = fitted
        assert np.array_equal(clone(model).fit_predict(X), model.labels_)
        assert np.array_equal(clone(model).fit_transform(X), model.transform(X))

    def test_seed_repeats_to_the_bit(self, fitted):
        model, X, _ = fitted
        again = clone(model).fit(X)
        assert np.array_equal(again.transform(X), model.transform(X))
        assert again.history_ == model.history_
        other = clone(model).set_params(random_state=1).fit(X)
        assert not np.array_equal(other.transform(X), model.transform(X))

    def test_global_generators_stay(self):
        X, _ = subspaces()
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        ts.ManifoldClustering(**QUICK | {"epochs": 1, "init_epochs": 1}).fit(X)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])

    def test_units_and_offset_of_the_data_do_not_matter(self, fitted):
        model, X, _ = fitted
        other = clone(model).fit(1024 * X)
        assert np.array_equal(other.labels_, model.labels_)

    def test_verbose_shows_a_bar(self, capsys):
        X, _ = subspaces()
        ts.ManifoldClustering(**QUICK | {"epochs": 1, "init_epochs": 1, "verbose": True}).fit(X)
        assert "2/2" in capsys.readouterr().err

    def test_callbacks(self):
        X, _ = subspaces()
        seen = []

        def watch(estimator, record):
            seen.append((estimator, record))
            return record["phase"] == "rate" and record["epoch"] == 3

        model = ts.ManifoldClustering(**QUICK, callbacks=[watch]).fit(X)
        assert [r for _, r in seen] == model.history_
        assert all(estimator is model for estimator, _ in seen)
        assert [r["phase"] for r in model.history_].count("rate") == 4  # True ended that phase
        assert [r["phase"] for r in model.history_].count("clusters") == 10

    def test_import_leaves_scikit_learn_alone(self):
        program = "import sys, torch_subspace as ts; assert not {'sklearn', 'scipy'} & set(sys.modules); "
        program += "assert 'ManifoldClustering' in dir(ts); ts.ManifoldClustering; assert 'sklearn' in sys.modules"
        subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def test_without_scikit_learn(self):
        program = "import sys\nsys.modules['sklearn'] = sys.modules['sklearn.base'] = None\n"
        program += "import torch_subspace as ts\n"
        program += "try: ts.ManifoldClustering\nexcept ImportError as e: assert 'pip install scikit-learn' in str(e)\n"
        program += "else: raise SystemExit('no error')"
        subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


class TestEncoder:
    def test_own_encoder_is_copied(self):
        X, y = make_blobs(90, 6, centers=3, random_state=1)
        encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        before = [p.clone() for p in encoder.parameters()]
        model = ts.ManifoldClustering(**QUICK, encoder=encoder).fit(X)
        assert same(before, encoder.parameters())
        assert not torch.equal(model.network_.encoder[0].weight, encoder[0].weight)
        assert clustering_accuracy(y, model.labels_) > 0.95

    def test_frozen_encoder_stays(self):
        X, _ = make_blobs(60, 6, centers=3, random_state=1)
        encoder = nn.Linear(6, 16).requires_grad_(False)
        model = ts.ManifoldClustering(**QUICK, encoder=encoder).fit(X)
        assert torch.equal(model.network_.encoder.weight, encoder.weight)

    def test_images_into_a_convolution(self):
        g = np.random.default_rng(0)
        X = g.normal(size=(40, 1, 6, 6)).astype(np.float32)
        encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        quick = QUICK | {"epochs": 1, "init_epochs": 1}
        model = ts.ManifoldClustering(**quick, encoder=encoder, augment="images", image_shape=(1, 6, 6)).fit(X)
        assert model.n_features_in_ == 36
        assert np.array_equal(model.predict(X), model.predict(X.reshape(40, 36)))
        with pytest.raises(ValueError, match=r"images of \(6, 6, 1\)"):
            model.predict(X.reshape(40, 6, 6, 1))

    @pytest.mark.parametrize("encoder", [nn.Flatten(0), nn.LSTM(6, 3)])
    def test_useless_encoder(self, encoder):
        X, _ = make_blobs(20, 6, random_state=1)
        with pytest.raises(ValueError, match="encoder must turn"):
            ts.ManifoldClustering(**QUICK, encoder=encoder).fit(X)


class TestErrors:
    @pytest.mark.parametrize(
        "name, value",
        [("n_clusters", 0), ("n_clusters", -1), ("n_clusters", 2.5), ("n_clusters", True), ("n_clusters", "3"),
         ("dim", 0), ("views", 0), ("batch_size", 1), ("readout_size", 2), ("epochs", -1), ("init_epochs", 1.5),
         ("eps", 0), ("eta", float("nan")), ("lr", -1), ("reg", -1), ("invariance", 3.0), ("weight_decay", "0"),
         ("encoder", "resnet"), ("hidden", 3), ("hidden", (0,)), ("augment", "pictures"), ("augment", "images"),
         ("invariance", (1, -1)), ("neighbors", -1), ("image_shape", (8,)), ("image_shape", 64)],
    )
    def test_bad_parameter(self, name, value):
        with pytest.raises(ValueError, match=name if value != "images" else "image_shape"):
            ts.ManifoldClustering(**QUICK | {name: value}).fit(subspaces()[0])

    def test_too_few_points(self):
        with pytest.raises(ValueError, match="n_samples=2 should be >= n_clusters=3"):
            ts.ManifoldClustering(**QUICK).fit(np.eye(2))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value, fitted):
        X = subspaces()[0]
        X[3, 4] = value
        with pytest.raises(ValueError, match="NaN|infinity"):
            ts.ManifoldClustering(**QUICK).fit(X)

    def test_shape_of_images(self):
        with pytest.raises(ValueError, match="image_shape"):
            ts.ManifoldClustering(**QUICK, image_shape=(3, 3)).fit(subspaces()[0])

    def test_breakdown_says_where(self):
        broken = ts.ManifoldClustering(**QUICK, augment=lambda x: x * float("nan"))
        with pytest.raises(RuntimeError):
            broken.fit(subspaces()[0])
        with pytest.raises(NotFittedError):
            broken.predict(subspaces()[0])

    def test_failed_fit_leaves_no_half(self, fitted):
        model = clone(fitted[0]).fit(fitted[1])
        model.set_params(augment=lambda x: x * float("nan"))
        with pytest.raises(RuntimeError):
            model.fit(fitted[1])
        with pytest.raises(NotFittedError):
            model.predict(fitted[1])


class TestFiles:
    def test_round_trip(self, fitted, tmp_path):
        model, X, _ = fitted
        path = tmp_path / "clusters.safetensors"
        model.save(path)
        assert os.listdir(tmp_path) == [path.name]
        other = ts.ManifoldClustering.load(path)
        assert other.get_params() == model.get_params()
        assert other.history_ == model.history_ and other.n_features_in_ == 6
        assert np.array_equal(other.labels_, model.labels_)
        assert np.array_equal(other.predict(X), model.predict(X))
        assert np.array_equal(other.transform(X), model.transform(X))
        with pytest.raises(ValueError, match="features"):
            other.predict(X[:, :5])

    def test_own_encoder(self, tmp_path):
        X, _ = make_blobs(60, 6, centers=3, random_state=1)
        model = ts.ManifoldClustering(**QUICK, encoder=nn.Linear(6, 5), callbacks=[lambda *_: None]).fit(X)
        path = tmp_path / "clusters.safetensors"
        model.save(path)
        other = ts.ManifoldClustering.load(path, encoder=nn.Linear(6, 5))
        assert np.array_equal(other.transform(X), model.transform(X))
        with pytest.raises(ValueError, match="give encoder="):
            ts.ManifoldClustering.load(path)
        with pytest.raises(ValueError, match="encoder does not fit"):
            ts.ManifoldClustering.load(path, encoder=nn.Linear(6, 4))

    def test_unfitted(self, tmp_path):
        with pytest.raises(NotFittedError):
            ts.ManifoldClustering().save(tmp_path / "x")
        assert not os.listdir(tmp_path)

    def test_missing_truncated_and_foreign(self, fitted, tmp_path):
        path = tmp_path / "clusters.safetensors"
        with pytest.raises(FileNotFoundError, match="clusters"):
            ts.ManifoldClustering.load(path)
        fitted[0].save(path)
        whole = path.read_bytes()
        for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="truncated or not"):
                ts.ManifoldClustering.load(path)
        save_file({"a": torch.ones(1)}, path)
        with pytest.raises(ValueError, match="not a clustering"):
            ts.ManifoldClustering.load(path)

    @pytest.mark.parametrize("change", ["drop", "shape", "label", "parameter", "version"])
    def test_tampered(self, change, fitted, tmp_path):
        path = tmp_path / "clusters.safetensors"
        fitted[0].save(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors, about = load_file(path), json.loads(metadata["estimator"])
        if change == "drop":
            del tensors["network.features.weight"]
        elif change == "shape":
            tensors["_potentials"] = tensors["_potentials"][1:].clone()
        elif change == "label":
            tensors["_anchor_labels"][0] = 3
        elif change == "parameter":
            about["parameters"]["eta"] = -1
        else:
            metadata["version"] = "2"
        save_file(tensors, path, metadata | {"estimator": json.dumps(about)})
        with pytest.raises(ValueError, match="load: "):
            ts.ManifoldClustering.load(path)

    def test_a_crash_leaves_the_old_file(self, fitted, tmp_path, monkeypatch):
        path = tmp_path / "clusters.safetensors"
        fitted[0].save(path)
        before = path.read_bytes()

        def crash(*_):
            raise OSError("full")

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="full"):
            fitted[0].save(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


class TestAugment:
    def test_image_maps_are_near_the_identity(self):
        augment = ImageAugment((8, 8), noise=0)
        x = torch.zeros(200, 64)
        x[:, 27] = 1
        y = augment(x)
        assert y.shape == x.shape
        ys, xs = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        y = y.view(200, 8, 8)
        centre = torch.stack([(y * ys).sum((1, 2)), (y * xs).sum((1, 2))]) / y.sum((1, 2))
        assert (centre - 3).abs().max() < 1.5
        assert (centre - 3).abs().mean() > 0.2

    def test_no_strength_is_no_change(self):
        x = torch.randn(5, 3, 7, 4)
        augment = ImageAugment((3, 7, 4), rotation=0, scale=0, shear=0, shift=0, noise=0)
        assert torch.allclose(augment(x), x, atol=1e-5)

    def test_rotation_keeps_right_angles_on_oblong_images(self):
        torch.manual_seed(0)
        augment = ImageAugment((4, 16), scale=0, shear=0, shift=0)
        maps = augment.maps(50, torch.float64, torch.device("cpu"))[:, :, :2]
        pixels = torch.diag(torch.tensor([8.0, 2.0], dtype=torch.float64))
        linear = pixels @ maps @ pixels.inverse()
        assert torch.allclose(linear @ linear.mT, torch.eye(2, dtype=torch.float64).expand(50, 2, 2))

    def test_noise(self):
        x = torch.zeros(10000)
        assert abs(Noise(0.5)(x).std() - 0.5) < 0.02

    def test_bad_shape(self):
        with pytest.raises(ValueError, match="shape must be"):
            ImageAugment((8,))
