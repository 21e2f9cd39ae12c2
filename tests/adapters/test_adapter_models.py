"""Adapters on models of torchvision, timm and transformers, without weights and at small sizes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_subspace as ts

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
IMAGE = (2, 3, 32, 32)
VIDEO = (1, 3, 4, 16, 16)


def torchvision(name, shape=IMAGE, **options):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models.get_model(name, weights=None, **options), {"x": torch.rand(shape)}


def torchvision_class(name, shape=IMAGE, **options):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return getattr(models, name)(**options), {"x": torch.rand(shape)}


def segmentation(name):
    model, x = torchvision(name, weights_backbone=None, num_classes=4)
    return model, x


def convnext():
    models = pytest.importorskip("torchvision.models.convnext", reason="torchvision is not installed")
    blocks = [models.CNBlockConfig(8, 16, 1), models.CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(blocks, num_classes=7), {"x": torch.rand(IMAGE)}


def swin_v2():
    models = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")
    parts = {"block": models.SwinTransformerBlockV2, "downsample_layer": models.PatchMergingV2}
    return models.SwinTransformer([4, 4], 8, [2, 1], [2, 2], [4, 4], num_classes=7, **parts), {"x": torch.rand(IMAGE)}


def swin3d():
    models = pytest.importorskip("torchvision.models.video.swin_transformer", reason="torchvision is not installed")
    model = models.SwinTransformer3d([2, 4, 4], 8, [2, 1], [2, 2], [2, 4, 4], num_classes=7)
    return model, {"x": torch.rand(VIDEO)}


def mvit():
    models = pytest.importorskip("torchvision.models.video.mvit", reason="torchvision is not installed")
    kernels = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3]}
    blocks = [
        models.MSBlockConfig(1, 8, 16, **kernels, stride_q=[1, 1, 1], stride_kv=[1, 2, 2]),
        models.MSBlockConfig(2, 16, 16, **kernels, stride_q=[1, 2, 2], stride_kv=[1, 1, 1]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    model = models.MViT((16, 16), 4, blocks, num_classes=7, **options)
    return model, {"x": torch.rand(VIDEO)}


def timm(name, shape=IMAGE, **options):
    create = pytest.importorskip("timm", reason="timm is not installed").create_model
    return create(name, **options), {"x": torch.rand(shape)}


def std_conv():
    models = pytest.importorskip("timm.models.resnetv2", reason="timm is not installed")
    layer = pytest.importorskip("timm.layers").StdConv2d
    model = models.ResNetV2((1, 1), (128, 128), num_classes=7, stem_chs=32, stem_type="fixed", conv_layer=layer)
    return model, {"x": torch.rand(IMAGE)}


def mixer():
    models = pytest.importorskip("timm.models.mlp_mixer", reason="timm is not installed")
    return models.MlpMixer(7, 32, patch_size=8, num_blocks=2, embed_dim=16), {"x": torch.rand(IMAGE)}


TOKENS = torch.tensor([[3, 4, 5, 2], [6, 7, 8, 2]])
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 50, **LAYERS, **ENDS}
ENCODER_DECODER = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, **ENDS, "decoder_start_token_id": 1,
}


def transformers(name, inputs, config=None, **options):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(library, config or name.partition("For")[0] + "Config")
    return getattr(library, name)(config(**options)), inputs


def clip():
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    vision = {**LAYERS, "image_size": 32, "patch_size": 16}
    config = library.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)
    return library.CLIPModel(config), {"input_ids": TOKENS, "pixel_values": torch.rand(IMAGE)}


class UNet(nn.Module):
    """A segmentation network with transposed, dilated, grouped and depthwise convolutions of every padding."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(8))
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), nn.GroupNorm(4, 16))
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16, padding_mode="circular", bias=False)
        self.middle = nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="replicate")
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1)
        self.up_grouped = nn.ConvTranspose2d(8, 8, 2, groups=4)
        self.last = nn.Conv2d(16, 2, (1, 2), padding="valid")

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        b = self.middle(b + self.depthwise(b))
        up = self.up_grouped(F.relu(self.up(b, output_size=a.shape[-2:])))[..., :-1, :-1]
        return self.last(torch.cat([a, up], 1))


def unet():
    return UNet(), {"x": torch.rand(IMAGE)}


def encoder():
    """torch's own TransformerEncoder, with its fast path in eval mode without gradients."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": torch.rand(2, 5, 16)}


def seq2seq():
    model = nn.Transformer(16, 2, 1, 1, 24, batch_first=True)
    return model, {"src": torch.rand(2, 5, 16), "tgt": torch.rand(2, 3, 16)}


def case(make, *args, config=None, unused=(), plain=(), **options):
    """How to build it; the adapter; layers that the forward leaves out; layers that can't or need not be adapted."""
    return make, args, options, config or {}, unused, plain


MODELS = {
    "resnet": case(torchvision, "resnet18", config={"target_modules": ("all-conv", "fc")}),
    "mobilenet_v3": case(torchvision, "mobilenet_v3_small", config={"kernel_rank": 2}),
    "convnext": case(convnext),
    "efficientnet": case(torchvision, "efficientnet_b0", config={"target_modules": r"features\.[1-4]\..*\.\d"}),
    "vit": case(torchvision_class, "VisionTransformer", image_size=32, patch_size=16, num_layers=2, num_heads=2,
                hidden_dim=16, mlp_dim=16),
    "swin": case(torchvision_class, "SwinTransformer", patch_size=[4, 4], embed_dim=8, depths=[2, 1], num_heads=[2, 2],
                 window_size=[4, 4]),
    "swin_v2": case(swin_v2),
    "densenet": case(torchvision_class, "DenseNet", growth_rate=4, block_config=(2, 2)),
    "regnet": case(torchvision, "regnet_y_400mf"),
    "maxvit": case(torchvision_class, "MaxVit", (1, 3, 32, 32), input_size=(32, 32), stem_channels=8,
                   partition_size=4, block_channels=[8, 16], block_layers=[1, 1], head_dim=4,
                   stochastic_depth_prob=0.0),
    "deeplabv3": case(segmentation, "deeplabv3_mobilenet_v3_large", config={"target_modules": r"classifier\..*"}),
    "fcn": case(segmentation, "fcn_resnet50", config={"target_modules": (r".*layer4.*conv\d", "classifier.4")}),
    "lraspp": case(segmentation, "lraspp_mobilenet_v3_large"),
    "r3d": case(torchvision, "r3d_18", VIDEO, config={"target_modules": "all-conv", "kernel_rank": (1, 2, 2)}),
    "swin3d": case(swin3d),
    "mvit": case(mvit, unused=("blocks.1.attn.pool_q.pool",)),  # the classifier reads the class token alone
    "unet": case(unet),
    "torch_encoder": case(encoder),
    "torch_transformer": case(seq2seq),
    "timm_vit": case(timm, "test_vit", (1, 3, 160, 160), config={"target_modules": ("attn.qkv", r".*mlp\.fc\d")}),
    "timm_conv2d_same": case(timm, "tf_mobilenetv3_small_minimal_100", config={"target_modules": "all-conv"}),
    "timm_std_conv": case(std_conv),
    "timm_beit": case(timm, "beit_base_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=7),
    "timm_mixer": case(mixer),
    "timm_xcit": case(timm, "xcit_nano_12_p16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=7),
    "timm_convnextv2": case(timm, "convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=7),
    "timm_nfnet": case(timm, "test_nfnet"),
    "timm_maxvit": case(timm, "test_maxvit", (1, 3, 64, 64), img_size=64),
    "bert": case(transformers, "BertForSequenceClassification", {"input_ids": TOKENS}, **TEXT,
                 config={"target_modules": ("all-linear", "word_embeddings", "position_embeddings")}),
    "gpt2": case(transformers, "GPT2LMHeadModel", {"input_ids": TOKENS}, config_name="GPT2Config", vocab_size=50,
                 n_embd=16, n_layer=2, n_head=2, **ENDS, plain=("lm_head",)),
    "t5": case(transformers, "T5ForConditionalGeneration", {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
               vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
               pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, plain=("lm_head",)),
    "llama": case(transformers, "LlamaForCausalLM", {"input_ids": TOKENS}, **TEXT, num_key_value_heads=1),
    "bart": case(transformers, "BartForConditionalGeneration", {"input_ids": TOKENS}, **ENCODER_DECODER,
                 config={"target_modules": ("all-linear", "embed_positions")}, plain=("lm_head",)),
    "whisper": case(transformers, "WhisperForConditionalGeneration",
                    {"input_features": torch.rand(2, 8, 40), "decoder_input_ids": TOKENS}, **ENCODER_DECODER,
                    num_mel_bins=8, max_source_positions=20, max_target_positions=10,
                    config={"target_modules": ("all-linear", "all-conv", "embed_positions")}, plain=("proj_out",)),
    "wav2vec2": case(transformers, "Wav2Vec2ForCTC", {"input_values": torch.rand(2, 400)}, **TEXT, conv_dim=(8, 8),
                     conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
                     num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
                     plain=("wav2vec2.encoder.pos_conv_embed.conv",)),
    "clip": case(clip),
    "segformer": case(transformers, "SegformerForSemanticSegmentation", {"pixel_values": torch.rand(IMAGE)},
                      num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
                      strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
                      num_labels=7),
    "mobilevit": case(transformers, "MobileViTForImageClassification", {"pixel_values": torch.rand(1, 3, 64, 64)},
                      image_size=64, hidden_sizes=[8, 16, 16], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16],
                      num_attention_heads=2, num_labels=7, initializer_range=0.3, output_stride=16),
}
SLOW = ("r3d", "fcn")
EACH = [key for key in MODELS if key not in ("r3d", "fcn", "regnet", "efficientnet", "lraspp", "deeplabv3")]


def build(key):
    """The model in eval mode, with every gain and gate off its starting value; its inputs; a config."""
    make, args, options, config, unused, plain = MODELS[key]
    options = dict(options)
    if "config_name" in options:
        options["config"] = options.pop("config_name")
    torch.manual_seed(0)
    model, inputs = make(*args, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.min() == p.max():
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval(), inputs, ts.TuckerConfig(rank=3, **config), set(unused), set(plain)


def flat(y):
    """All floating tensors in y, flat and in one."""

    def tensors(y):
        if isinstance(y, torch.Tensor):
            return [y.flatten()] if y.is_floating_point() else []
        parts = y.values() if isinstance(y, dict) else y if isinstance(y, (list, tuple)) else ()
        return [t for part in parts for t in tensors(part)]

    return torch.cat(tensors(y))


def outputs(model, inputs):
    """All that the model gives, flat."""
    args = inputs.values() if set(inputs) <= {"x", "src", "tgt"} else ()
    return flat(model(*args, **({} if args else inputs)))


def see(model, inputs):
    with torch.no_grad():
        return outputs(model, inputs)


def layers_agree(model, fresh, inputs):
    """Gives each adapted layer what the layer of `fresh` gives for the same input, bit for bit?

    Torch takes other products for weights that are frozen than for those that are trained, and on some processors these
    differ in the last bit; so a model with both kinds may agree with neither of the two whole models.
    """
    agree, own = [], dict(fresh.named_modules())

    def compare(name, args, kwargs, y):
        layers = [copy.deepcopy(own[name]).requires_grad_(trained) for trained in (True, False)]
        agree.append(any(torch.equal(flat(y), flat(layer(*args, **kwargs))) for layer in layers))

    hooks = [m.register_forward_hook(lambda m, args, kwargs, y, name=name: compare(name, args, kwargs, y),
                                     with_kwargs=True) for name, m in adapted(model).items()]
    y = outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return y.isfinite().all() and len(agree) > 0 and all(agree)


def adapted(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "tucker")}


def parts_of(layer):
    return [part for parts in layer.tucker.values() for part in parts.values()]


def bases(model):
    """Parameters and buffers that are not an adapter's."""
    return {k: v.clone() for k, v in model.state_dict().items() if "tucker" not in k.split(".")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def move(layer, size=0.1):
    """Give the layer's changes about `size` of the base's norm."""
    for parameters in layer.tucker.values():
        for parameter, part in parameters.items():
            part.core.normal_()
            change = ts.tucker_compose(part.core, part.factors, scale=part.scale).norm()
            part.core.mul_(size * layer._parameters[parameter].norm() / change)


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


@pytest.mark.parametrize("key", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in MODELS])
def test_adapt_train_save_load_merge(key, tmp_path):
    model, inputs, config, unused, plain = build(key)
    fresh, before, kinds = copy.deepcopy(model), bases(model), classes(model)
    start = outputs(model, inputs).detach()
    fast = [see(model, inputs)]  # some layers have another path without gradients
    frozen = outputs(copy.deepcopy(model).requires_grad_(False), inputs)  # and choose another kernel for frozen parts
    fast.append(see(copy.deepcopy(model).requires_grad_(False), inputs))
    assert start.isfinite().all() and start.std() > 0

    assert ts.adapt(model, config) is model
    found = adapted(model)
    if config.target_modules == ("all-linear", "all-conv"):
        assert {n for n, m in model.named_modules() if isinstance(m, KINDS)} - set(found) == plain
    with torch.no_grad():
        same = any(torch.equal(outputs(model, inputs), y) for y in fast) or layers_agree(model, fresh, inputs)
    assert same, "an adapter that starts at zero changed the output"
    y = outputs(model, inputs).detach()
    same = torch.equal(y, start) or torch.equal(y, frozen) or layers_agree(model, fresh, inputs)
    assert same, "an adapter that starts at zero changed the output"
    assert equal(bases(model), before)

    optimizer = torch.optim.SGD(ts.adapter_parameters(model), lr=1.0)
    y = outputs(model, inputs)
    (y * torch.randn_like(y)).sum().backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, layer in found.items():
        for part in parts_of(layer):
            if name in unused:
                assert part.core.grad is None or not part.core.grad.any()
                continue
            for n, p in part.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all(), f"{name}.{n}"
            assert part.core.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    assert equal(bases(model), before)
    assert not torch.equal(outputs(model, inputs).detach(), start)

    for layer in found.values():
        move(layer)
    y = outputs(model, inputs).detach()
    assert y.isfinite().all()
    ts.save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = ts.load_adapter(copy.deepcopy(fresh), tmp_path / "adapter.safetensors")
    assert torch.equal(outputs(loaded, inputs).detach(), y)
    assert torch.equal(outputs(copy.deepcopy(model), inputs).detach(), y)
    if MODELS[key][0] not in (transformers, clip):  # whose hooks don't go into a pickle
        assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), inputs).detach(), y)
    with ts.disabled(model):
        assert any(torch.equal(see(model, inputs), y) for y in fast)
        assert torch.equal(outputs(model, inputs), frozen)

    ts.merge(model)
    bound = 1e-5 * y.abs().max()
    assert (outputs(model, inputs).detach() - y).abs().max() <= bound
    assert (see(model, inputs) - y).abs().max() <= bound
    ts.unmerge(model)
    assert equal(bases(model), before)
    assert torch.equal(outputs(model, inputs).detach(), y)

    ts.merge_and_unload(model)
    assert classes(model) == kinds and list(model.state_dict()) == list(before)
    assert not any(k.startswith("tucker") for m in model.modules() for k in m.__dict__)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, inputs).detach(), outputs(model, inputs).detach())
    assert (outputs(fresh, inputs).detach() - y).abs().max() <= bound


@pytest.mark.parametrize("key", EACH)
def test_each_layer_is_seen(key):
    """A change of one layer alone changes the output, with and without gradients; float64, where no gate hides it."""
    model, inputs, config, unused, _ = build(key)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    ts.adapt(model.double(), config)
    start, fast = outputs(model, inputs).detach(), see(model, inputs)
    found = list(adapted(model).items())
    for name, layer in found[:: len(found) // 16 + 1]:  # some have hundreds
        for part in parts_of(layer):
            with torch.no_grad():
                part.core.normal_()
            assert torch.equal(outputs(model, inputs).detach(), start) == (name in unused), name
            assert torch.equal(see(model, inputs), fast) == (name in unused), f"{name} without gradients"
            nn.init.zeros_(part.core)
    assert torch.equal(outputs(model, inputs).detach(), start)


@pytest.mark.parametrize("key", ["vit", "swin", "timm_conv2d_same", "timm_beit", "torch_encoder", "unet", "bert"])
def test_export_keeps_the_adapter(key):
    model, inputs, config, _, _ = build(key)
    ts.adapt(model, config)
    for layer in adapted(model).values():
        move(layer, 0.5)
    y = see(model, inputs)
    named = MODELS[key][0] is transformers
    with torch.no_grad():
        program = torch.export.export(model, () if named else (*inputs.values(),), inputs if named else {})
    got = see(program.module(), inputs)
    assert (got - y).abs().max() <= 1e-5 * y.abs().max()


def batchnorms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class TestHabits:
    def test_batchnorm_in_training_keeps_its_own_statistics(self):
        model, inputs, config, _, _ = build("resnet")
        plain = copy.deepcopy(model).train()
        ts.adapt(model, config)
        assert not any(layer.training for layer in adapted(model).values())
        model.train()
        assert torch.equal(outputs(model, inputs).detach(), outputs(plain, inputs).detach())
        for a, b in zip(batchnorms(model), batchnorms(plain), strict=True):
            assert torch.equal(a.running_mean, b.running_mean) and not a.weight.requires_grad

    def test_frozen_batchnorm(self):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        model, inputs = torchvision("resnet18", norm_layer=ops.FrozenBatchNorm2d)
        y = outputs(model.eval(), inputs).detach()
        ts.adapt(model, ts.TuckerConfig(rank=3))
        assert torch.equal(outputs(model, inputs).detach(), y)
        outputs(model, inputs).sum().backward()
        assert all(part.core.grad is not None for layer in adapted(model).values() for part in parts_of(layer))

    def test_a_layer_used_twice_and_a_module_of_two_names(self, tmp_path):
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))
        fresh, x = copy.deepcopy(model), torch.randn(4, 6)
        ts.adapt(model, ts.TuckerConfig(rank=2))
        assert len(adapted(model)) == 2 and model[0] is model[2]
        for adapter in adapted(model).values():
            move(adapter, 0.5)
        y = model(x)
        y.sum().backward()
        assert all(part.core.grad.abs().sum() > 0 for a in adapted(model).values() for part in parts_of(a))
        ts.save_adapter(model, tmp_path / "a.safetensors")
        assert torch.equal(ts.load_adapter(fresh, tmp_path / "a.safetensors")(x), y)
        torch.testing.assert_close(ts.merge(model)(x), y)

    def test_either_name_of_a_shared_module_counts(self):
        def make():
            layer = nn.Linear(4, 4)
            return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})

        model = ts.adapt(make(), ts.TuckerConfig(target_modules="b"))
        assert hasattr(model["b"], "tucker") and not hasattr(model["c"], "tucker")
        model = ts.adapt(make(), ts.TuckerConfig(exclude_modules="b"))
        assert hasattr(model["c"], "tucker") and not hasattr(model["b"], "tucker")

    def test_layers_that_the_forward_leaves_out(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.used(x)

        model = ts.adapt(Net(), ts.TuckerConfig(rank=2))
        optimizer = torch.optim.SGD(ts.adapter_parameters(model), lr=0.1)
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        assert model.idle.tucker["default"]["weight"].core.grad is None
        ts.merge_and_unload(model)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv1d(6, 6, 1)])
    def test_forward_replaced_on_the_object(self, make, when):
        model, x = nn.Sequential(make()), torch.randn(6, 6)

        def replace(module):
            old = module.forward
            module.forward = lambda x: old(x) + 1

        if when == "before":
            replace(model[0])
            plain = model(x).detach()
        ts.adapt(model, ts.TuckerConfig(rank=2))
        if when == "after":
            plain = model(x).detach() + 1
            replace(model[0])
        torch.testing.assert_close(model(x).detach(), plain)
        move(model[0], 0.5)
        y = model(x).detach()
        assert not torch.allclose(y, plain, atol=1e-3)
        torch.testing.assert_close(ts.merge(model)(x), y)

    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Linear(4, 5), torch.randn(2, 4)),
            (nn.Conv2d(4, 5, 3), torch.randn(2, 4, 6, 6)),
            (nn.ConvTranspose1d(4, 5, 3), torch.randn(2, 4, 6)),
            (nn.Embedding(4, 5), torch.tensor([1, 3])),
        ],
    )
    def test_input_by_its_name(self, layer, x):
        model = nn.Sequential(copy.deepcopy(layer))
        ts.adapt(model, ts.TuckerConfig(rank=2, target_modules="0"))
        assert torch.equal(model[0](input=x), layer(x))

    def test_a_weight_read_by_the_parent(self):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return x @ self.layer.weight.T.mul(2) + self.layer.bias

        model, x = Reader(), torch.randn(3, 4)
        ts.adapt(model, ts.TuckerConfig(rank=2))
        move(model.layer, 0.5)
        y = model(x)
        y.sum().backward()
        assert model.layer.tucker["default"]["weight"].core.grad.abs().sum() > 0
        torch.testing.assert_close(ts.merge(model)(x), y)

    def test_functional_call(self):
        model, inputs, config, _, _ = build("vit")
        ts.adapt(model, config)
        for layer in adapted(model).values():
            move(layer)
        got = torch.func.functional_call(model, dict(model.named_parameters()), (inputs["x"],))
        assert torch.equal(got, model(inputs["x"]))

    def test_fast_path_of_the_encoder_without_gradients(self):
        model, inputs, config, _, _ = build("torch_encoder")
        ts.adapt(model, config)
        for layer in adapted(model).values():
            move(layer, 0.5)
        torch.testing.assert_close(see(model, inputs), outputs(model, inputs).detach())


class TestRefusals:
    def refuse(self, model, match, *targets):
        before = classes(model)
        with pytest.raises(ValueError, match=match):
            ts.adapt(model, ts.TuckerConfig(rank=2, target_modules=targets))
        assert classes(model) == before

    def test_every_target_must_match(self):
        self.refuse(nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}), "typo", "fc1", "typo")

    def test_tied(self):
        model, *_ = build("gpt2")
        self.refuse(model, "lm_head.*tied|tied.*lm_head", "c_attn", "lm_head")
        self.refuse(model, "wte.*tied", "wte")

    def test_tied_through_the_memory(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model["b"].weight = nn.Parameter(model["a"].weight.data)
        self.refuse(model, "tied", "a", "b")

    def test_weight_norm(self):
        model, *_ = build("wav2vec2")
        self.refuse(model, "pos_conv_embed.conv.*parametrised", "pos_conv_embed.conv")

    def test_kinds_without_an_adapter(self):
        self.refuse(nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.Linear(4, 4)}), "'a'.*LSTM", "a", "b")
        self.refuse(nn.ModuleDict({"a": nn.Bilinear(4, 4, 2), "b": nn.Linear(4, 4)}), "'a'.*Bilinear", "a", "b")

    @pytest.mark.filterwarnings("ignore")
    def test_torchs_own_quantised_layer(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model = torch.ao.quantization.quantize_dynamic(model, {"b"}, dtype=torch.qint8)
        self.refuse(model, "'b'", "a", "b")


def read_at_once(self, x):
    return F.linear(x, self.layer.weight, self.layer.bias)


def read_through_a_variable(self, x):
    layer = self.layer
    return F.linear(x, layer.weight, layer.bias)


def read_in_a_loop(self, x):
    for layer in self.children():
        x = F.linear(x, layer.weight, layer.bias)
    return x


def read_by_a_helper(self, x):
    return read_at_once(type("View", (), {"layer": self.layer}), x)


def read_by_name(self, x):
    return F.linear(x, getattr(self.layer, "weight"), self.layer.bias)  # noqa: B009


READERS = {f.__name__: f for f in (read_at_once, read_through_a_variable, read_in_a_loop, read_by_a_helper,
                                   read_by_name)}


@pytest.mark.filterwarnings("ignore")
class TestQuantised:
    def net(self, module):
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        torchao.quantize_(module, torchao.Int8WeightOnlyConfig())
        return module

    def test_linear(self, tmp_path):
        model, x = self.net(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))), torch.randn(3, 32)
        fresh, start = copy.deepcopy(model), model(x).detach()
        ts.adapt(model, ts.TuckerConfig(rank=4))
        assert torch.equal(model(x).detach(), start)
        model(x).sum().backward()
        for layer in adapted(model).values():
            part = layer.tucker["default"]["weight"]
            assert part.core.grad.abs().sum() > 0
            nn.init.normal_(part.core, std=0.1)
            assert not torch.equal(model(x).detach(), start)
        y = model(x).detach()
        ts.save_adapter(model, tmp_path / "a.safetensors")
        assert torch.equal(ts.load_adapter(fresh, tmp_path / "a.safetensors")(x).detach(), y)
        with pytest.raises(ValueError, match="quantised"):
            ts.merge(model)

    def changes_or_refuses(self, model, name, x):
        """The adapter is seen, or the layer is refused by its name: at `adapt`, or at the latest where it is read."""
        start = model(x).detach()
        try:
            ts.adapt(model, ts.TuckerConfig(rank=4, target_modules=name))
            nn.init.normal_(model.get_submodule(name).tucker["default"]["weight"].core, std=0.1)
            y = model(x).detach()
        except (ValueError, RuntimeError) as error:
            assert repr(name) in str(error) and "packed" in str(error)
        else:
            assert not torch.equal(y, start), "the adapter was ignored"

    def test_a_replaced_forward_never_hides_the_adapter(self):
        model = self.net(nn.Sequential(nn.Linear(32, 32)))
        old = model[0].forward
        model[0].forward = lambda x: old(x)
        self.changes_or_refuses(model, "0", torch.randn(3, 32))

    @pytest.mark.parametrize("how", READERS)
    def test_a_reader_of_the_weight_never_hides_the_adapter(self, how):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(32, 32)

        Reader.forward = READERS[how]
        self.changes_or_refuses(self.net(Reader()), "layer", torch.randn(3, 32))
