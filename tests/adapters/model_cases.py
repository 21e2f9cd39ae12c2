"""Models of torchvision, timm and transformers, without weights and at small sizes, and adapters on them."""

import torch
import torch.nn.functional as F
from helpers import optional
from torch import nn

import torch_subspace as ts

IMAGE = (2, 3, 32, 32)
VIDEO = (1, 3, 4, 16, 16)


def torchvision(name, shape=IMAGE, **options):
    models = optional("torchvision.models")
    return models.get_model(name, weights=None, **options), {"x": torch.rand(shape)}


def torchvision_class(name, shape=IMAGE, **options):
    models = optional("torchvision.models")
    return getattr(models, name)(**options), {"x": torch.rand(shape)}


def segmentation(name):
    model, x = torchvision(name, weights_backbone=None, num_classes=4)
    return model, x


def convnext():
    models = optional("torchvision.models.convnext")
    blocks = [models.CNBlockConfig(8, 16, 1), models.CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(blocks, num_classes=7), {"x": torch.rand(IMAGE)}


def swin_v2():
    models = optional("torchvision.models.swin_transformer")
    parts = {"block": models.SwinTransformerBlockV2, "downsample_layer": models.PatchMergingV2}
    return models.SwinTransformer([4, 4], 8, [2, 1], [2, 2], [4, 4], num_classes=7, **parts), {"x": torch.rand(IMAGE)}


def swin3d():
    models = optional("torchvision.models.video.swin_transformer")
    model = models.SwinTransformer3d([2, 4, 4], 8, [2, 1], [2, 2], [2, 4, 4], num_classes=7)
    return model, {"x": torch.rand(VIDEO)}


def mvit():
    models = optional("torchvision.models.video.mvit")
    kernels = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3]}
    blocks = [
        models.MSBlockConfig(1, 8, 16, **kernels, stride_q=[1, 1, 1], stride_kv=[1, 2, 2]),
        models.MSBlockConfig(2, 16, 16, **kernels, stride_q=[1, 2, 2], stride_kv=[1, 1, 1]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    model = models.MViT((16, 16), 4, blocks, num_classes=7, **options)
    return model, {"x": torch.rand(VIDEO)}


def timm(name, shape=IMAGE, **options):
    create = optional("timm").create_model
    return create(name, **options), {"x": torch.rand(shape)}


def std_conv():
    models = optional("timm.models.resnetv2")
    layer = optional("timm.layers").StdConv2d
    model = models.ResNetV2((1, 1), (128, 128), num_classes=7, stem_chs=32, stem_type="fixed", conv_layer=layer)
    return model, {"x": torch.rand(IMAGE)}


def mixer():
    models = optional("timm.models.mlp_mixer")
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
    library = optional("transformers")
    config = getattr(library, config or name.partition("For")[0] + "Config")
    return getattr(library, name)(config(**options)), inputs


def clip():
    library = optional("transformers")
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


def adapted(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "tucker")}


def parts_of(layer):
    return [part for parts in layer.tucker.values() for part in parts.values()]


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
