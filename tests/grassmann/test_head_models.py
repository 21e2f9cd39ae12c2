"""swap_head on models of torchvision, timm and transformers, without weights and at small sizes."""

import pytest
import torch
from head_cases import IMAGE, MODELS, build, heads, timm, torchvision, transformers
from helpers import optional

from torch_subspace import GrassmannLinear, swap_head


def logits(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


class TestModels:
    @pytest.mark.parametrize("key", MODELS)
    def test_swap(self, key):
        model, x, names = build(key)
        num_classes = 7 if MODELS[key][0] is transformers else 400 if key == "r3d" else 1000
        others = {n: m for n, m in model.named_modules() if n not in names}
        assert swap_head(model, subspace_dim=3) is model
        assert list(heads(model)) == names or sorted(heads(model)) == sorted(names)
        assert {n: m for n, m in model.named_modules() if n not in names} == others
        for head in heads(model).values():
            assert head.num_classes == num_classes and head.frame_error() < 1e-6 and not head.training

        y = logits(model, x)
        assert y.shape[-1] == num_classes and y.shape[0] == len(x) and (y >= 0).all() and (y <= 25.001).all()
        y.sum().backward()
        second = ("aux", "Aux")  # used in training only
        assert all(m.weight.grad.abs().sum() > 0 for n, m in heads(model).items() if not n.startswith(second))

        swap_head(model.bfloat16(), 5, (1, 2, 3, 2, 1), gamma=10.0, normalize=False)
        assert sorted(heads(model)) == sorted(names)
        for head in heads(model).values():
            assert head.dims == (1, 2, 3, 2, 1) and head.weight.dtype == torch.float32 and head.gamma == 10
        x = x.bfloat16() if x.is_floating_point() else x
        y = logits(model, x)
        assert y.dtype == torch.bfloat16 and y.shape[-1] == 5 and y.isfinite().all()
        for holder in model.modules():
            assert vars(holder).get("num_classes", 5) == vars(holder).get("num_labels", 5) == 5
        if hasattr(model, "config"):
            assert model.config.num_labels == len(model.config.id2label) == len(model.config.label2id) == 5

    def test_in_training_auxiliary_classifiers_follow(self):
        model, x, _ = build("googlenet")
        out = swap_head(model.train(), 5, 2)(x)
        assert out.logits.shape == out.aux_logits1.shape == out.aux_logits2.shape == (2, 5)

    def test_transformers_loss(self):
        model, x, _ = build("bert")
        loss = swap_head(model, 3, 2)(x, labels=torch.tensor([0, 2])).loss
        loss.backward()
        assert loss.isfinite() and model.classifier.weight.grad is not None

    def test_transformers_keeps_label_names_while_their_number_stays(self):
        model, _, _ = build("bert")
        model.config.id2label = {i: f"label {i}" for i in range(7)}
        assert swap_head(model).config.id2label[3] == "label 3"

    def test_timm_wrapped_by_transformers(self):
        optional("timm")
        library = optional("transformers")
        config = library.TimmWrapperConfig(architecture="test_resnet", num_labels=7)
        model = swap_head(library.TimmWrapperForImageClassification(config).eval(), 5, 2)
        assert isinstance(model.timm_model.fc, GrassmannLinear)
        assert model.config.num_labels == model.num_labels == model.timm_model.num_classes == 5
        assert model(torch.rand(IMAGE)).logits.shape == (2, 5)

    def test_timm_model_without_a_classifier(self):
        model, _ = timm("test_resnet", num_classes=0)
        with pytest.raises(ValueError, match="num_classes=0"):
            swap_head(model, 5)

    def test_detection_models_ask_for_a_name(self):
        model, _ = torchvision("fasterrcnn_mobilenet_v3_large_320_fpn", weights_backbone=None)
        with pytest.raises(ValueError, match="name=.*roi_heads.box_predictor.cls_score"):
            swap_head(model)
        swap_head(model, name="roi_heads.box_predictor.cls_score")
        assert list(heads(model)) == ["roi_heads.box_predictor.cls_score"]

    def test_segmentation(self):
        model, x = torchvision("fcn_resnet50", (1, 3, 32, 32), weights_backbone=None, num_classes=4, aux_loss=True)
        out = swap_head(model.eval(), 5, 2)(x)
        assert out["out"].shape == out["aux"].shape == (1, 5, 32, 32)
