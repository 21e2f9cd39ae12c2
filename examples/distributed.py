"""Train a body and a class-parallel head on several processes: 3755 Chinese characters, seen in some faces of type.

    apt install fonts-arphic-gbsn00lp fonts-arphic-gkai00mp fonts-arphic-ukai fonts-arphic-uming fonts-wqy-microhei \
        fonts-wqy-zenhei fonts-droid-fallback
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 20 examples/distributed.py

The characters of GB 2312's first level are rendered in five faces to train on, and in two others to be recognised in.
Rows and classes are shared out among the same processes, as in Partial-FC: the body under `fully_shard`, the head by
`shard_head`. After every epoch `torch.distributed.checkpoint` saves both and the optimiser. A run that was killed goes
on from there, under torchrun by itself, and ends with the bits of one that was not: random numbers are those of the
epoch, and sums are taken in one order. What is printed last is a sum over the bits of all weights. kill_loop.py tries
it; the variable lets torchrun take a fresh store for each start, where gloo may else find addresses of the one before.
"""

import argparse
import hashlib
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import torch_subspace as ts

TRAIN = ("gbsn00lp.ttf", "gkai00mp.ttf", "ukai.ttc", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc")
UNSEEN = ("uming.ttc", "wqy-zenhei.ttc")
PACKAGES = ("fonts-arphic-gbsn00lp fonts-arphic-gkai00mp fonts-arphic-ukai fonts-droid-fallback fonts-wqy-microhei "
            "fonts-arphic-uming fonts-wqy-zenhei")
SIDE = 32


def arguments():
    """The command line."""
    build = Path(__file__).resolve().parents[1] / "build"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256, help="rows of all processes together (default: 256)")
    parser.add_argument("--characters", type=int, default=3755, help="as many of the 3755 (default: all)")
    parser.add_argument("--subspace-dim", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the body (default: 0.001), the frames' is less")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="searched with all folders in it")
    parser.add_argument("--folder", type=Path, default=build / "glyphs", help="of the checkpoints")
    return parser.parse_args()


def faces(folder, names):
    """Files of these names in the folder."""
    found = {path.name: path for path in sorted(folder.rglob("*.tt[cf]"))}
    if missing := [name for name in names if name not in found]:
        sys.exit(f"no {', '.join(missing)} in {folder}: on Debian and Ubuntu `apt install {PACKAGES}`, or --fonts")
    return [found[name] for name in names]


def characters(rows, last):
    """Those of GB 2312 in these rows, up to the last one."""
    codes = ((row, column) for row in rows for column in range(0xA1, 0xFF))
    return [bytes(code).decode("gb2312") for code in codes if code <= last]


def drawn(paths, which):
    """(faces x characters, 1, SIDE, SIDE) in [-1, 1], face by face."""
    pages = []
    for path in paths:
        font = ImageFont.truetype(path, SIDE - 4)
        for character in which:
            image = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(image).text((SIDE // 2, SIDE // 2), character, fill=255, font=font, anchor="mm")
            pages.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
    return torch.stack(pages).view(-1, 1, SIDE, SIDE).float() / 127.5 - 1


def glyphs(paths, count):
    """The first of the 3755 characters as images, and which characters they are."""
    which = characters(range(0xB0, 0xD8), (0xD7, 0xF9))[:count]
    return drawn(paths, which), torch.arange(len(which)).repeat(len(paths))


def body(width=48):
    """Features of 256 from a glyph."""
    layers, channels = [], 1
    for i in range(3):
        layers += [nn.Conv2d(channels, width << i, 3, 2, 1), nn.GroupNorm(8, width << i), nn.GELU()]
        channels = width << i
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (SIDE // 8) ** 2, 256))


def moved(images):
    """Each a little off its place."""
    shift = torch.randint(-2, 3, (2, images.shape[0], 1, 1))
    rows, columns = ((torch.arange(SIDE).view(shape) - s) % SIDE for shape, s in zip(((-1, 1), (1, -1)), shift))
    return images[torch.arange(images.shape[0])[:, None, None], 0, rows, columns][:, None]


def saved(folder):
    """Epochs that are on the disk, whole."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def save(folder, epoch, model, opt):
    """Under a name that is given only when all is written; the one before is kept until then."""
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{epoch}.part")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / f"{epoch}.part").rename(folder / str(epoch))
        for old in saved(folder)[:-2]:
            shutil.rmtree(folder / str(old))
    dist.barrier()


def load(folder, epoch, model, opt):
    """Back to the end of that epoch."""
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / str(epoch))
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)


@torch.no_grad()
def accuracy(model, images, labels):
    """Share of the images that are recognised; each process looks at its rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model.eval()
    whole = len(labels) // size * size
    right = torch.zeros(())
    for rows in torch.arange(whole).view(-1, size)[:, rank].split(512):
        right += (model["head"](model["body"](images[rows])).argmax(-1) == labels[rows]).sum()
    dist.all_reduce(right)
    model.train()
    model["body"].reshard()  # whole since the last call, for a backward that does not come
    return right.item() / whole


def digest(model):
    """A sum over the bits of all weights."""
    whole = hashlib.sha256()
    for weight in model.parameters():
        whole.update(weight.detach().full_tensor().numpy().tobytes())
    return whole.hexdigest()[:16]


def main():
    """Train on, from the last checkpoint if there is one."""
    args = arguments()
    train, unseen = faces(args.fonts, TRAIN), faces(args.fonts, UNSEEN)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    args.folder.mkdir(parents=True, exist_ok=True)
    images, labels = glyphs(train, args.characters)
    others, their_labels = glyphs(unseen, args.characters)

    torch.manual_seed(0)
    mesh = dist.init_device_mesh("cpu", (size,))
    model = nn.ModuleDict({"body": body(), "head": ts.GrassmannLinear(256, args.characters, args.subspace_dim)})
    done = saved(args.folder)
    if not done:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few features a class, but what is trained on is moved each time
            model["head"].init_from_features(torch.cat([model["body"](part) for part in images.split(512)]), labels)
    ts.distributed.shard_head(model, mesh, input_layouts=Shard(0), output_layouts=Shard(0))
    fully_shard(model["body"], mesh=mesh)
    opt = ts.RiemannianAdamW(ts.param_groups(model, weight_decay=1e-2, frame_lr_factor=0.1), lr=args.lr)
    peaks = [group["lr"] for group in opt.param_groups]
    batches, mine = len(labels) // args.batch, args.batch // size

    first = 0
    if done:
        first = done[-1]
        load(args.folder, first, model, opt)
        if rank == 0:
            print(f"on from the end of epoch {first}", flush=True)
    for epoch in range(first, args.epochs):
        torch.manual_seed(epoch)
        total = 0.0
        for i, rows in enumerate(torch.randperm(len(labels))[: batches * args.batch].view(batches, size, mine)):
            for group, peak in zip(opt.param_groups, peaks):
                group["lr"] = peak * (1 - (epoch + i / batches) / args.epochs)
            opt.zero_grad()
            x, y = moved(images[rows.flatten()]).view(size, mine, 1, SIDE, SIDE)[rank], labels[rows[rank]]
            loss = model["head"].loss(model["body"](x), y)
            loss.backward()
            opt.step()
            total += loss.item()
        save(args.folder, epoch + 1, model, opt)
        share = accuracy(model, others, their_labels)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total / batches:.3f}, in unseen faces {share:.1%} right", flush=True)
    bits = digest(model)
    if rank == 0:
        print(f"weights {bits}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
