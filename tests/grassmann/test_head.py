"""swap_head on models of torchvision, timm and transformers, without weights and at small sizes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from torch_subspace import GrassmannLinear, RiemannianSGD, param_groups, swap_head

IMAGE = (2, 3, 64, 64)


def torchvision(name, image=IMAGE, **options):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models.get_model(name, weights=None, **options), torch.rand(image)


def torchvision_class(name, image=IMAGE, **options):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return getattr(models, name)(**options), torch.rand(image)


def timm(name, image=IMAGE, **options):
    create = pytest.importorskip("timm", reason="timm is not installed").create_model
    return create(name, **options), torch.rand(image)


TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 7,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "num_labels": 7,
}
TOKENS = torch.tensor([[3, 4, 5, 2], [6, 7, 8, 2]])


def transformers(name, x=TOKENS, **options):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(library, name.partition("For")[0] + "Config")
    options = options or (TEXT if x is TOKENS else VISION)
    return getattr(library, name)(config(**options)), x


PIXELS = torch.rand(2, 3, 32, 32)


def case(make, what, *names, **options):
    """A model and the names of its classifiers."""
    return make, what, names, options


MODELS = {
    "resnet": case(torchvision, "resnet18", "fc"),
    "squeezenet": case(torchvision, "squeezenet1_1", "classifier.1"),
    "densenet": case(torchvision_class, "DenseNet", "classifier", growth_rate=4, block_config=(2, 2)),
    "mobilenet_v2": case(torchvision, "mobilenet_v2", "classifier.1", width_mult=0.25),
    "mobilenet_v3": case(torchvision, "mobilenet_v3_small", "classifier.3"),
    "mnasnet": case(torchvision, "mnasnet0_5", "classifier.1"),
    "shufflenet": case(torchvision, "shufflenet_v2_x0_5", "fc"),
    "regnet": case(torchvision, "regnet_y_400mf", "fc"),
    "googlenet": case(torchvision, "googlenet", "fc", "aux1.fc2", "aux2.fc2", init_weights=False),
    "inception": case(torchvision, "inception_v3", "fc", "AuxLogits.fc", image=(2, 3, 75, 75), init_weights=False),
    "swin": case(
        torchvision_class,
        "SwinTransformer",
        "head",
        patch_size=[4, 4],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=[4, 4],
    ),
    "vit": case(
        torchvision_class,
        "VisionTransformer",
        "heads.head",
        image_size=64,
        patch_size=32,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=16,
    ),
    "r3d": case(torchvision, "r3d_18", "fc", image=(1, 3, 4, 16, 16)),
    "timm_resnet": case(timm, "test_resnet", "fc"),
    "timm_vit": case(timm, "test_vit", "head", image=(2, 3, 160, 160)),
    "timm_byobnet": case(timm, "test_byobnet", "head.fc"),
    "timm_efficientnet": case(timm, "test_efficientnet", "classifier"),
    "timm_convnext": case(timm, "test_convnext", "head.fc"),
    "timm_nfnet": case(timm, "test_nfnet", "head.fc"),
    "timm_mambaout": case(timm, "test_mambaout", "head.fc"),
    "timm_mobilenetv3": case(timm, "mobilenetv3_small_050", "classifier"),
    "timm_dla": case(timm, "dla46_c", "fc"),
    "timm_resnetv2": case(timm, "resnetv2_18", "head.fc"),
    "timm_levit": case(timm, "levit_128s", "head.linear", "head_dist.linear", image=(2, 3, 224, 224)),
    "timm_deit_distilled": case(timm, "deit_tiny_distilled_patch16_224", "head", "head_dist", img_size=64, depth=1),
    "timm_repvit": case(timm, "repvit_m0_9", "head.head.l", "head.head_dist.l"),
    "timm_crossvit": case(timm, "crossvit_9_240", "head.0", "head.1", image=(1, 3, 240, 240)),
    "timm_metaformer": case(timm, "caformer_s18", "head.fc.fc2"),
    "timm_inception_next": case(timm, "inception_next_atto", "head.fc2"),
    "bert": case(transformers, "BertForSequenceClassification", "classifier"),
    "roberta": case(transformers, "RobertaForSequenceClassification", "classifier.out_proj"),
    "electra": case(transformers, "ElectraForSequenceClassification", "classifier.out_proj"),
    "distilbert": case(
        transformers,
        "DistilBertForSequenceClassification",
        "classifier",
        vocab_size=50,
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=16,
        num_labels=7,
    ),
    "gpt2": case(
        transformers,
        "GPT2ForSequenceClassification",
        "score",
        vocab_size=50,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=7,
        pad_token_id=0,
    ),
    "llama": case(transformers, "LlamaForSequenceClassification", "score"),
    "bart": case(
        transformers,
        "BartForSequenceClassification",
        "classification_head.out_proj",
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_labels=7,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "xlm": case(
        transformers,
        "XLMForSequenceClassification",
        "sequence_summary.summary",
        vocab_size=50,
        emb_dim=16,
        n_layers=1,
        n_heads=2,
        num_labels=7,
    ),
    "hf_token_classification": case(transformers, "BertForTokenClassification", "classifier"),
    "hf_vit": case(transformers, "ViTForImageClassification", "classifier", x=PIXELS),
    "hf_deit_teacher": case(
        transformers, "DeiTForImageClassificationWithTeacher", "cls_classifier", "distillation_classifier", x=PIXELS
    ),
    "hf_resnet": case(
        transformers,
        "ResNetForImageClassification",
        "classifier.1",
        x=PIXELS,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_labels=7,
    ),
    "hf_convnext": case(
        transformers,
        "ConvNextForImageClassification",
        "classifier",
        x=PIXELS,
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_labels=7,
    ),
    "hf_swin": case(
        transformers,
        "SwinForImageClassification",
        "classifier",
        x=PIXELS,
        image_size=32,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
        num_labels=7,
    ),
}


def build(key):
    make, what, names, options = MODELS[key]
    torch.manual_seed(0)
    model, x = make(what, **options)
    return model.eval(), x, list(names)


def logits(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def heads(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, GrassmannLinear)}


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
        pytest.importorskip("timm", reason="timm is not installed")
        library = pytest.importorskip("transformers", reason="transformers is not installed")
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
