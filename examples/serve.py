"""Package a classifier with a Grassmann head and an adapter, and serve it from C, without Python in the process.

    python examples/serve.py

A small convolutional network learns scikit-learn's digits; its linear layer is then adapted, with the rest frozen, to
digits that are upside down. `torch.export` and AOTInductor write build/serve/digits.pt2, which serve.c runs on held-out
images. Its answers are held against those of the model here. It needs a C and a C++ compiler.
"""

import argparse
import subprocess
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import torch_subspace as ts

SHAPE = (1, 8, 8)
HOST = Path(__file__).with_name("serve.c")


def classifier():
    """Logits of ten classes for 8 x 8 images."""
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Flatten(),
                         nn.Linear(512, 64), nn.GELU(), ts.GrassmannLinear(64, 10, subspace_dim=4))


def train(model, images, labels, epochs, lr):
    """All that is trainable, by one optimiser."""
    opt = ts.RiemannianAdamW(ts.param_groups(model, lr=lr))
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            opt.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            opt.step()


def package(model, shape, path):
    """Write the model, for any number of images of the shape, compiled for processors like this one."""
    example = torch.zeros(64, *shape)  # as many as serve.c takes at once
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    options = {"aot_inductor.metadata": {"image": "x".join(map(str, shape))},  # serve.c asks for it
               "aot_inductor.check_lowerbound": False}  # torch asks of a convolution whether it gets 16 images or less
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    return program


def build(program, compiler="cc"):
    """Compile serve.c against this torch; only torch's libraries are needed where it runs."""
    lib = Path(torch.__path__[0]) / "lib"
    subprocess.run([compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", HOST, "-o", program, f"-L{lib}",
                    f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-ldl", "-lm"], check=True)


def main():
    """Train, package, serve, compare."""
    folder = Path(__file__).resolve().parents[1] / "build" / "serve"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=folder, help="what is written lies there (default: build/serve)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    rows = torch.randperm(len(labels))
    learn, held_out = rows[:1200], rows[1200:]
    model = classifier()
    train(model, images[learn], labels[learn], args.epochs, lr=3e-3)
    images = images.flip(-1, -2)  # upside down
    ts.adapt(model, ts.TuckerConfig(rank=8, target_modules=["5"]))
    train(model, images[learn], labels[learn], args.epochs, lr=3e-3)

    pt2, host, raw = (args.folder / name for name in ("digits.pt2", "serve", "images.f32"))
    package(model, SHAPE, pt2)
    images[held_out].numpy().tofile(raw)
    build(host)
    with raw.open() as stream:
        said = subprocess.run([host, pt2], stdin=stream, stdout=subprocess.PIPE, text=True, check=True).stdout
    classes, probabilities = torch.tensor([[float(word) for word in line.split()] for line in said.splitlines()]).T
    with torch.no_grad():
        expected, best = model(images[held_out]).softmax(-1).max(-1)
        python = torch._inductor.aoti_load_package(str(pt2))(images[held_out]).softmax(-1).max(-1).values
    right = (classes == labels[held_out]).float().mean()
    print(f"{host} {pt2} < {raw}\n"
          f"{len(classes)} images upside down, {right:.1%} right; {(classes == best).float().mean():.1%} as here; "
          f"probabilities differ by {(probabilities - expected).abs().max():.0e} in C, "
          f"{(python - expected).abs().max():.0e} in Python")


if __name__ == "__main__":
    main()
