"""Classifiers of torchvision, timm and transformers, without weights and at small sizes."""

import torch
from helpers import optional

from torch_subspace import GrassmannLinear

IMAGE = (2, 3, 64, 64)


def torchvision(name, image=IMAGE, **options):
    models = optional("torchvision.models")
    return models.get_model(name, weights=None, **options), torch.rand(image)


def torchvision_class(name, image=IMAGE, **options):
    models = optional("torchvision.models")
    return getattr(models, name)(**options), torch.rand(image)


def timm(name, image=IMAGE, **options):
    create = optional("timm").create_model
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
    library = optional("transformers")
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


def heads(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, GrassmannLinear)}
