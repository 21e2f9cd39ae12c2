"""The scale of the logits: by rule, by number, and from a checkpoint."""

import io
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from torch_subspace import GrassmannLinear, swap_head


def gamma(n, classes, k, **options):
    return GrassmannLinear(n, classes, k, device="meta", **options).gamma


class TestRule:
    def test_is_the_papers_for_imagenet(self):
        assert gamma(2048, 1000, 8) == pytest.approx(25, rel=0.05)

    @pytest.mark.parametrize("n, k", [(384, 8), (128, 1), (128, 64)])
    def test_logits_of_a_new_head_have_the_spread(self, n, k):
        torch.manual_seed(0)
        heads = (GrassmannLinear(n, 4, k)(torch.randn(50, n)) for _ in range(10))
        assert torch.cat(list(heads)).std().item() == pytest.approx(0.4 * math.sqrt(1 - k / n), rel=0.2)

    @pytest.mark.parametrize("n, classes, k", [(64, 2, 8), (128, 3755, 2), (512, 10**6, 8)])
    def test_a_class_can_reach_the_probability(self, n, classes, k):
        others = (classes - 1) * math.exp(-(gamma(n, classes, k) + 0.05) * (1 - math.sqrt(k / n)))
        assert 1 / (1 + others) > 0.75

    def test_takes_all_sizes(self):
        for classes in (0, 1, 2):
            assert 0 < gamma(6, classes, 2) < 10
        assert gamma(6, 4, 6) < 10  # every length is 1
        assert gamma(6, 0, []) > 0
        assert gamma(64, 100, [1, 3] * 50) == gamma(64, 100, 2)

    def test_features_of_any_length_are_a_scale_themselves(self):
        assert gamma(384, 8, 8, normalize=False) == 1

    def test_numbers_mean_what_they_say(self):
        assert gamma(384, 8, 8, gamma=25) == 25
        assert "gamma=11.1," in repr(GrassmannLinear(384, 8, 8))

    def test_holds_for_layers_made_of_others(self):
        model = nn.Sequential(nn.ReLU(), nn.Linear(384, 8))
        assert GrassmannLinear.from_linear(model[1]).gamma == gamma(384, 8, 8)
        assert swap_head(model, 30, 4)[1].gamma == gamma(384, 30, 4)
        assert swap_head(model, gamma=7.0)[1].gamma == 7
        assert GrassmannLinear.from_linear(nn.Linear(384, 8), gamma=7.0).gamma == 7

    @pytest.mark.parametrize("word", ["Auto", "25", ""])
    def test_other_words_are_refused(self, word):
        for make in (lambda: GrassmannLinear(6, 4, 2, gamma=word),
                     lambda: swap_head(nn.Sequential(nn.ReLU(), nn.Linear(8, 4)), gamma=word)):
            with pytest.raises(ValueError, match=f'GrassmannLinear: gamma must be "auto" or a number.*{word!r}'):
                make()


class TestCheckpoints:
    def head(self, **options):
        return GrassmannLinear(6, 4, 2, **options)

    @pytest.mark.parametrize("given, loaded", [({}, 25), ({"gamma": 3.0}, 3)])
    def test_the_papers_keep_theirs(self, given, loaded):
        state = {"fc.weight": self.head().weight.detach().flatten(0, 1)}
        assert self.head(**given).load_gcr(state).gamma == loaded
        for key in ("fc.weight", "weight"):
            layer = self.head(**given)
            layer.load_state_dict({key: state["fc.weight"]})
            assert layer.gamma == loaded

    def test_torchs_files_say_it(self):
        file, model = io.BytesIO(), nn.Sequential(nn.ReLU(), self.head(gamma=7.0))
        torch.save(model.state_dict(), file)
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        by_rule, by_number = (nn.Sequential(nn.ReLU(), self.head(**given)) for given in ({}, {"gamma": 3.0}))
        for other in (by_rule, by_number):
            other.load_state_dict(state)
        assert (by_rule[1].gamma, by_number[1].gamma) == (7, 3)

    def test_those_from_before_the_rule_had_25(self):
        state = self.head().state_dict()
        del state._metadata[""]["gamma"]
        layer = self.head()
        layer.load_state_dict(state)
        assert layer.gamma == 25

    def test_plain_tensors_leave_it(self):
        source, layer = self.head(gamma=7.0), self.head()
        layer.load_state_dict(load(save(source.state_dict())))
        assert torch.equal(layer.weight, source.weight) and layer.gamma == self.head().gamma

    def test_what_fails_leaves_it(self):
        layer = self.head()
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict(GrassmannLinear(6, 4, 3, gamma=7.0).state_dict())
        assert layer.gamma == self.head().gamma
