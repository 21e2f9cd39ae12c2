"""swap_head: the classifier it finds, what the head starts from, and its errors."""

import copy
import pickle

import pytest
import torch
from head_cases import heads
from torch import nn

from torch_subspace import GrassmannLinear, RiemannianSGD, param_groups, swap_head


class Net(nn.Module):
    """A model of the user's own, with any attributes."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


class TestSearch:
    @pytest.mark.parametrize(
        ("model", "name"),
        [
            (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "2"),
            (lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4), nn.Dropout())), "1.0"),
            (lambda: Net(body=nn.Linear(6, 6), head=nn.Linear(6, 4)), "head"),
            (lambda: Net(body=nn.Identity(), last=nn.Linear(6, 4)), "last"),
            (lambda: Net(net=nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))), "net.1"),
            (lambda: nn.DataParallel(Net(body=nn.Linear(6, 6), fc=nn.Linear(6, 4))), "module.fc"),
            (lambda: torch.compile(Net(body=nn.Linear(6, 6), fc=nn.Linear(6, 4)), backend="eager"), "_orig_mod.fc"),
            (lambda: Net(num_classes=6, body=nn.Linear(6, 6), fc=nn.Linear(6, 4)), "fc"),
            (lambda: Net(num_classes=4, a=nn.Linear(6, 6), b=nn.Linear(6, 4)), "b"),
        ],
    )
    def test_models_of_ones_own(self, model, name):
        model = model()
        swap_head(model, subspace_dim=2)
        assert list(heads(model)) == [name]
        assert model(torch.randn(3, 6)).shape == (3, 4)

    def test_ambiguous_models_name_the_candidates(self):
        for model in (
            Net(a=nn.Linear(6, 6), b=nn.Linear(6, 4)),
            Net(fc=nn.Linear(6, 6), head=nn.Linear(6, 4)),
            Net(head=nn.ModuleDict({"kind": nn.Linear(6, 3), "place": nn.Linear(6, 4)})),
        ):
            with pytest.raises(ValueError, match=r"can't tell.*6 outputs.*4 outputs|can't tell.*head.kind.*head.place"):
                swap_head(model)
            assert not heads(model)

    def test_name_overrides(self):
        model = Net(fc=nn.Linear(6, 6), head=nn.Linear(6, 4), deep=nn.Sequential(nn.ModuleDict({"x": nn.Linear(4, 3)})))
        swap_head(model, subspace_dim=2, name="head")
        swap_head(model, name="deep.0.x", subspace_dim=1)
        assert list(heads(model)) == ["head", "deep.0.x"]

    def test_second_swap_after_a_name(self):
        model = Net(a=nn.Linear(6, 6), b=nn.Linear(6, 4))
        swap_head(model, subspace_dim=2, name="b")
        assert swap_head(model, 3, 2)(torch.randn(5, 6)).shape == (5, 3)

    def test_a_module_registered_twice_is_replaced_twice(self):
        layer = nn.Linear(6, 4)
        model = Net(body=nn.Linear(6, 6), head=layer, alias=layer, also=nn.ModuleList([layer]))
        swap_head(model, subspace_dim=2)
        assert model.head is model.alias is model.also[0] and isinstance(model.head, GrassmannLinear)


class TestInit:
    def model(self, out=4):
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, out))

    def test_class_vectors_are_kept_where_the_number_of_classes_is(self):
        model = self.model()
        vectors = nn.functional.normalize(model[1].weight.detach(), dim=-1)
        swap_head(model, subspace_dim=3)
        torch.testing.assert_close(model[1].weight.detach()[:, 0], vectors)

    def test_frames_are_kept_where_the_number_of_classes_is(self):
        model = swap_head(self.model(), subspace_dim=2)
        before = model[1].weight.detach()
        torch.testing.assert_close(swap_head(model, subspace_dim=3)[1].weight.detach()[:, :2], before)

    def test_another_number_of_classes_starts_at_random(self):
        assert swap_head(self.model(), 10, 3)[1].frame_error() < 1e-6

    def test_random(self):
        model = self.model()
        vectors = nn.functional.normalize(model[1].weight.detach(), dim=-1)
        swap_head(model, subspace_dim=3, init="random")
        assert ((model[1].weight.detach()[:, 0] * vectors).sum(-1).abs() < 0.999).any()

    def test_features_and_labels(self):
        model, x, y = self.model(), torch.randn(60, 6), torch.arange(60) % 5
        features = model[0](x).detach()
        swap_head(model, 5, 3, init=(features, y))
        want = GrassmannLinear(8, 5, 3).init_from_features(features, y)
        torch.testing.assert_close(model(x), want(features))

    def test_features_are_the_main_classifiers(self):
        model, x, y = Net(fc=nn.Linear(6, 5), head_dist=nn.Linear(8, 5)), torch.randn(60, 6), torch.arange(60) % 5
        vectors = nn.functional.normalize(model.head_dist.weight.detach(), dim=-1)
        swap_head(model, subspace_dim=3, init=(x, y))
        torch.testing.assert_close(model.fc(x), GrassmannLinear(6, 5, 3).init_from_features(x, y)(x))
        torch.testing.assert_close(model.head_dist.weight.detach()[:, 0], vectors)

    def test_one_by_one_convolutions(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        vectors = nn.functional.normalize(model[1].weight.detach()[:, :, 0, 0], dim=-1)
        swap_head(model, subspace_dim=2)
        torch.testing.assert_close(model[1].weight.detach()[:, 0], vectors)
        x = torch.randn(2, 8, 5, 5)
        y = model[1](x)
        assert y.shape == (2, 4, 5, 5)
        plain = GrassmannLinear(8, 4, 2)
        plain.load_state_dict(model[1].state_dict())
        torch.testing.assert_close(y[1, :, 2, 3], plain(x[1, :, 2, 3]))
        target = torch.randint(4, (2, 5, 5))
        torch.testing.assert_close(model[1].loss(x, target), nn.functional.cross_entropy(y, target))
        soft = torch.rand(2, 4, 5, 5).softmax(1)
        torch.testing.assert_close(model[1].loss(x, soft), nn.functional.cross_entropy(y, soft))


class TestHabits:
    def test_training_mode_dtype_and_grad(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double().requires_grad_(False)
        model[1].eval()
        swap_head(model, subspace_dim=2)
        assert model[0].training and not model[1].training
        assert model[1].weight.dtype == torch.float64 and model[1].weight.requires_grad
        assert not model[0].weight.requires_grad

    def test_trains_with_the_riemannian_optimiser(self):
        model = swap_head(nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1), nn.Flatten()), subspace_dim=2)
        x, target = torch.randn(64, 6, 1, 1), torch.randint(4, (64,))
        optimizer = RiemannianSGD(param_groups(model), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(20):
            losses.append(nn.functional.cross_entropy(model(x), target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0] and model[1].frame_error() < 1e-5

    def test_meta(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        assert swap_head(model, subspace_dim=2)[1].weight.is_meta

    def test_copies(self):
        model, x = swap_head(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), 5, 2), torch.randn(2, 3, 4, 4)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), model(x))


class TestErrors:
    def swap(self, error, match, model, *args, **options):
        before = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        with pytest.raises(error, match=match):
            swap_head(model, *args, **options)
        assert before == (dict(model.named_modules()) if isinstance(model, nn.Module) else {})

    def net(self):
        return Net(num_classes=4, body=nn.Linear(6, 6), act=nn.ReLU(), head=nn.Linear(6, 4))

    def test_arguments(self):
        self.swap(TypeError, "nn.Module", "resnet18")
        self.swap(ValueError, "init", self.net(), init="linaer")
        self.swap(TypeError, "init", self.net(), init=3)
        self.swap(TypeError, "init", self.net(), init=(torch.ones(2, 6),))
        self.swap(ValueError, "subspace_dim", self.net(), 4, 7)
        self.swap(ValueError, "num_classes", self.net(), -1, 2)
        self.swap(ValueError, "gamma", self.net(), 4, 2, gamma=-1.0)
        self.swap(ValueError, "need x", self.net(), 4, 2, init=(torch.ones(2, 5), torch.zeros(2).long()))

    def test_names(self):
        self.swap(ValueError, "no module named 'neck'.*'head'", self.net(), name="neck")
        self.swap(TypeError, "'act' is a ReLU", self.net(), name="act")
        self.swap(TypeError, "'conv' is a Conv2d", Net(conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 4)), name="conv")
        self.swap(ValueError, "itself", nn.Linear(6, 4), 4, 2)
        self.swap(ValueError, "no linear layer", nn.Sequential(nn.ReLU()))

    def test_weights_that_are_not_the_heads_own(self):
        tied = Net(embed=nn.Embedding(4, 6), body=nn.Linear(6, 6), head=nn.Linear(6, 4))
        tied.head.weight = tied.embed.weight
        self.swap(ValueError, "tied.*'embed', 'head'", tied)
        parametrizations = nn.utils.parametrizations
        for wrap in (parametrizations.weight_norm, parametrizations.orthogonal, nn.utils.spectral_norm):
            net = self.net()
            wrap(net.head)
            self.swap(ValueError, "parametrised", net)
        self.swap(ValueError, "lazy", Net(body=nn.Linear(6, 6), head=nn.LazyLinear(4)))

    def test_one_of_two_classifiers_cannot_be_swapped(self):
        two = Net(fc=nn.Linear(6, 4), head_dist=nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
        self.swap(ValueError, "parametrised", Net(**dict(two.named_children())), subspace_dim=2)
        self.swap(ValueError, "in_features = 3", Net(fc=nn.Linear(6, 4), head_dist=nn.Linear(3, 4)), subspace_dim=4)
