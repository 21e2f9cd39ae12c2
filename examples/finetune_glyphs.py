"""A task of finetune.py: a network that knows a thousand Chinese characters learns the Japanese syllables.

Both are rendered from the fonts that distributed.py names: five faces of type to learn from, two others to be measured
in. Of each of the 169 signs of Hiragana and Katakana there are thus five images, and all layers after the first get
adapters: two convolutions and the linear layer that makes the features. The spectral adapter, which trains singular
values alone, has far fewer parameters than the others, and the least LoRA stands beside it.
"""

import copy
import functools
from pathlib import Path

import distributed as source
import torch
from finetune_protocol import fit
from many_classes import FEATURES, Model
from torch import nn
from torch.nn.functional import avg_pool2d

import torch_subspace as ts

SIGNS = source.characters([0xA4], (0xA4, 0xF3)) + source.characters([0xA5], (0xA5, 0xF6))
CHINESE = source.characters(range(0xB0, 0xD8), (0xD7, 0xF9))[:1000]


class Syllables:
    """The task: what is learnt, by which methods, with which settings."""

    title, output, ours = "Japanese syllables", "finetune_glyphs.png", "ours"
    shots, batch, epochs, seeds, evaluations = 5, 50, 20, 3, 5
    grid = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    # method: the best of the grid in validation, one seed: 87.6, 92.3, 91.1, 91.1, 94.1, 88.2 and 87.6 %
    rates = dict.fromkeys(("head only", "LoRA (peft)", "LoCon (LyCORIS)", "ours", "full fine-tuning",
                           "LoRA (peft), rank 1", "spectral adapter"), 1e-2)
    layers = ["body.3", "body.6", "body.10"]
    lora_rank = 4  # 6784 parameters in these three layers; the two below have 6626
    locon_ranks = {"body.3": 9, "body.6": 9, "body.10": 4}
    ranks = {"body.3": 9, "body.6": 9, "body.10": 4}  # of Tucker's channel modes

    def __init__(self):
        self.bases = {}

    @staticmethod
    @functools.cache
    def drawn(which, unseen):
        """(faces, characters, 1, 16, 16)."""
        faces = source.faces(Path("/usr/share/fonts"), source.UNSEEN if unseen else source.TRAIN)
        images = avg_pool2d(source.drawn(faces, SIGNS if which == "signs" else CHINESE), 2)
        return images.unflatten(0, (len(faces), -1))

    def data(self, seed, validate):
        """(images, labels) to train on and to measure on: the unseen faces, or in validation the last of the others."""
        images, others = self.drawn("signs", False), self.drawn("signs", True)
        if validate:
            images, others = images[:-1], images[-1:]
        return tuple((faces.flatten(0, 1), torch.arange(len(SIGNS)).repeat(len(faces))) for faces in (images, others))

    def base(self, seed):
        """A network that was trained on Chinese characters."""
        if seed not in self.bases:
            torch.manual_seed(seed)
            self.bases[seed] = model = Model("linear", len(CHINESE), {})
            images = self.drawn("chinese", False)
            known = images.flatten(0, 1), torch.arange(len(CHINESE)).repeat(len(images))
            fit(model, model.parameters(), known, epochs=12, batch=128, lr=3e-3)
        return copy.deepcopy(self.bases[seed])

    def build(self, method, seed, trained=True):
        """A model and those of its parameters that are to be trained; not `trained`: on a base that knows nothing."""
        model = self.base(seed) if trained else Model("linear", len(CHINESE), {})
        torch.manual_seed(seed)
        model.head = nn.Linear(FEATURES, len(SIGNS))
        if method == "ours":
            ts.adapt(model, ts.TuckerConfig(rank_pattern=self.ranks, target_modules=self.layers, save_modules="head"))
            return model, ts.adapter_parameters(model)
        if method == "spectral adapter":  # all singular values: it has no more to train
            ts.adapt(model, ts.SpectralConfig(FEATURES, target_modules=self.layers, save_modules="head"))
            return model, ts.adapter_parameters(model)
        if method == "full fine-tuning":
            return model, list(model.parameters())
        model.body.requires_grad_(False)
        if method.startswith("LoRA"):
            import peft  # takes seconds

            r = 1 if method.endswith("rank 1") else self.lora_rank
            peft.inject_adapter_in_model(peft.LoraConfig(r=r, lora_alpha=r, target_modules=self.layers), model)
            model.head.requires_grad_(True)
        if method == "LoCon (LyCORIS)":
            from lycoris.modules.locon import LoConModule

            for name, rank in self.locon_ranks.items():
                layer = model.get_submodule(name)
                change = LoConModule(name, layer, lora_dim=rank, alpha=rank, use_tucker=isinstance(layer, nn.Conv2d))
                change.apply_to()
                layer.change = change
        return model, [p for p in model.parameters() if p.requires_grad]

    def notes(self, models):
        """Parameters of each method without the head."""
        head = FEATURES * len(SIGNS) + len(SIGNS)
        counts = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) - head
                  for name, model in models.items()}
        return ["Trained beside the head's " f"{head:,}: " + ", ".join(f"{k} {n:,}" for k, n in counts.items()) + "."]
