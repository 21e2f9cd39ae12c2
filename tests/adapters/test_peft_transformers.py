"""The method `tucker` in peft on models of transformers, through transformers' own calls."""
import copy
import os

import pytest
import torch
from adapter_cases import relative
from peft_cases import peft, quiet, stir, transformers
from torch import nn

from torch_subspace.peft import TuckerConfig, TuckerLayer

pytestmark = quiet

BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32}


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))


def gpt2(**more):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, **more)
    return transformers.GPT2LMHeadModel(config).eval()


def test_default_targets_of_an_architecture():
    model = peft.get_peft_model(bert(), TuckerConfig(r=2, task_type="SEQ_CLS"))
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, TuckerLayer)}
    assert names == {"query", "value"}
    assert any("classifier.modules_to_save.default" in n for n, p in model.named_parameters() if p.requires_grad)


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (48, 8), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i, 0] % 3}


def train(folder, resume=None):
    config = TuckerConfig(r=4, dropout=0.1, task_type="SEQ_CLS", target_modules="all-linear")
    model = peft.get_peft_model(bert(), config)
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to=[], logging_steps=1, disable_tqdm=True, seed=3)
    trainer = transformers.Trainer(model, args, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_trainer_resumes_to_the_bit(tmp_path):
    whole, trainer = train(tmp_path / "a")
    state = {n: p.detach().clone() for n, p in whole.named_parameters() if p.requires_grad}
    assert any(".tucker_parts." in n for n in state) and any(".modules_to_save." in n for n in state)
    start = peft.get_peft_model_state_dict(whole)
    assert all(t.abs().sum() > 0 for k, t in start.items() if k.endswith(".core"))  # it has learnt
    again, _ = train(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"))
    for n, p in again.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, state[n]), n
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "a" / "checkpoint-6").eval()
    ids = Texts().ids[:4]
    assert torch.equal(loaded(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)


def test_adapters_of_transformers_itself(tmp_path):
    try:
        gpt2().add_adapter(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    except (ImportError, ValueError) as error:
        pytest.skip(f"not even LoRA: {error}")  # this transformers does not take this peft
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    base = model(ids).logits
    model.add_adapter(TuckerConfig(r=3, target_modules=["c_attn", "c_fc"]), "one")
    assert torch.equal(model(ids).logits, base)
    stir(model, "one")
    y = model(ids).logits
    assert relative(y, base) > 1e-3
    model.disable_adapters()
    assert torch.equal(model(ids).logits, base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path))
    other = gpt2()
    other.load_adapter(str(tmp_path), "again")
    assert torch.equal(other(ids).logits, y)
    other.add_adapter(TuckerConfig(r=2, target_modules=["c_proj"]), "two")
    assert other.active_adapters() == ["two"]
    other.set_adapter("again")
    assert torch.equal(other(ids).logits, y)
    other.delete_adapter(["again", "two"])
    assert torch.equal(other(ids).logits, base)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings", "ignore:Input and output embeddings")
def test_tied_embeddings_are_untied_by_merging():
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    assert model.lm_head.weight is model.transformer.wte.weight
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["wte"])))
    y, head = adapted(ids).logits, model.lm_head.weight.clone()
    adapted.merge_adapter()
    assert torch.equal(model.lm_head.weight, head) and relative(adapted(ids).logits, y) < 1e-5
    adapted.unmerge_adapter()
    assert model.lm_head.weight is model.transformer.wte.base_layer.weight
    plain = adapted.merge_and_unload()
    assert relative(plain(ids).logits, y) < 1e-5


def test_generate_and_gradient_checkpointing():
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, task_type="CAUSAL_LM", target_modules="all-linear")))
    out = adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    plain = copy.deepcopy(adapted).merge_and_unload()
    assert torch.equal(out, plain.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0))
    adapted(input_ids=ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    adapted.gradient_checkpointing_enable()
    adapted.train()
    model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.0
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    adapted(input_ids=ids, labels=ids).loss.backward()
    for n, p in adapted.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-6)
