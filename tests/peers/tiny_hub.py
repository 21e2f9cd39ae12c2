"""A cache of the Hugging Face hub with tiny random models under the names that peft's tests ask for."""
from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

# the first word found in a name tells its kind
KINDS = {"gptneox": "gpt_neox", "gptj": "gptj", "gptoss": "gpt_oss", "gpt2": "gpt2", "opt": "opt",
         "llama4": "llama4_text", "llama": "llama", "qwen3moe": "qwen3_moe", "qwen2": "qwen2", "qwen3": "qwen3",
         "gemma3": "gemma3_text", "mistral": "mistral", "mixtral": "mixtral", "bloom": "bloom", "t5": "t5",
         "bart": "bart", "whisper": "whisper", "roberta": "roberta", "debertav2": "deberta-v2", "deberta": "deberta",
         "bert": "bert", "resnet": "resnet", "clip": "clip_text_model"}
LEFT_OUT = "lora|boft|gptq|awq|aqlm|revision|_VL"
SIZES = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "projection_dim": 32,
    "pooler_hidden_size": 32, "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_ff": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "moe_intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "head_dim": 8, "d_kv": 8, "rotary_dim": 4, "num_hidden_layers": 3, "n_layer": 3,
    "num_layers": 3, "num_decoder_layers": 3, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 300,
    "max_position_embeddings": 128, "n_positions": 128, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "num_mel_bins": 16,
    "max_source_positions": 20, "max_target_positions": 64, "pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 3, "begin_suppress_tokens": None, "suppress_tokens": None}


def kind_of(name: str) -> str | None:
    plain = re.sub("[^a-z0-9]", "", name.split("/")[-1].lower())
    found = [word for word in KINDS if word in plain]
    return KINDS[found[0]] if found else None


def make(cache: Path, tests: Path) -> None:
    """Fill the cache with every model named in the tests that isn't there yet, but for those left out."""
    text = "".join(p.read_text() for p in sorted(tests.glob("test*.py")))
    for name in sorted(set(re.findall(r"[\"']([\w-]+/[\w.-]+)[\"']", text))):
        folder = cache / ("models--" + name.replace("/", "--"))
        if kind_of(name) and not re.search(LEFT_OUT, name, re.I) and not folder.exists():
            try:
                _save(name, folder / "snapshots" / ("0" * 40))
            except Exception as error:  # of one model: its tests say that it is missing
                shutil.rmtree(folder, ignore_errors=True)
                print(f"no tiny {name}: {error}")
            else:
                (folder / "refs").mkdir()
                (folder / "refs" / "main").write_text("0" * 40)


def _save(name: str, folder: Path) -> None:
    import torch
    import transformers

    kind = kind_of(name)
    cls = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    plain = cls()
    config = cls(**{k: v for k, v in SIZES.items() if hasattr(plain, k) or k.endswith("token_id")})
    if "125m" in name:  # as deep as the real one: tests name its layers
        config.num_hidden_layers = 12
    named = re.search(r"[A-Z]\w*(For[A-Z]\w+|LMHeadModel|Model)\b", name.split("/")[-1])
    model_cls = getattr(transformers, named.group(), None) if named else None
    if model_cls is None:
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model_cls = auto if type(config) in auto._model_mapping else transformers.AutoModel
    torch.manual_seed(0)
    model = model_cls.from_config(config) if model_cls.__name__.startswith("Auto") else model_cls(config)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer():
    """Bytes, after four special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<unk>", "</s>", "<pad>"]  # 1 is a word in the tests, so it is not the padding
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(w, special=True) for w in special])
    names = dict(zip(("bos_token", "unk_token", "eos_token", "pad_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=128, **names)


def use(cache: Path) -> None:
    """Of every Python process that starts after: no network."""
    os.environ |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
