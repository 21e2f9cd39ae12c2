"""examples/timm_train.py: the commands of docs/recipes.md, run by a script that calls timm as its train.py does.

train.py is not in timm's package: with its path in TIMM_TRAIN the commands are run by it too, for two steps.
"""

import argparse
import copy
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers import frame_error, same

import torch_subspace as ts

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
timm = pytest.importorskip("timm")
for part in ("loss", "optim", "scheduler"):
    pytest.importorskip(f"timm.{part}")
import timm_train  # noqa: E402

SCRIPT = """
import argparse
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, dispatch_clip_grad

parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("initial-checkpoint", "resume", "output"):
    parser.add_argument("--" + name, default="")
for name in ("lr", "weight-decay", "warmup-lr", "min-lr", "clip-grad", "drop-path", "opt-eps"):
    parser.add_argument("--" + name, type=float)
for name in ("epochs", "warmup-epochs", "stop"):
    parser.add_argument("--" + name, type=int)
for name in ("warmup-prefix", "bce-loss"):
    parser.add_argument("--" + name, action="store_true")
parser.add_argument("--model")
parser.add_argument("--opt")
parser.set_defaults(momentum=0.9, sched="cosine", min_lr=0.0, warmup_lr=1e-5)
args = parser.parse_known_args()[0]

torch.manual_seed(0)
x, y = torch.randn(8, 3, 32, 32), torch.rand(8, 4).softmax(-1)
model = create_model(args.model, num_classes=4, drop_path_rate=args.drop_path, checkpoint_path=args.initial_checkpoint)
teacher = create_model(args.model, num_classes=3)
optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
loss_fn = BinaryCrossEntropy() if args.bce_loss else SoftTargetCrossEntropy()
average, start = ModelEmaV3(model, decay=0.9), 0
if args.resume:
    saved = torch.load(args.resume)
    model.load_state_dict(saved["state_dict"])
    average.module.load_state_dict(saved["state_dict_ema"])
    optimizer.load_state_dict(saved["optimizer"])
    start = saved["epoch"] + 1
scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
if start:
    scheduler.step(start)
for epoch in range(start, args.stop):
    torch.manual_seed(epoch)
    loss_fn(model(x), y).backward()
    if args.clip_grad is not None:
        dispatch_clip_grad(model.parameters(), value=args.clip_grad, mode="norm")
    optimizer.step()
    optimizer.zero_grad()
    average.update(model, step=epoch)
    scheduler.step(epoch + 1)
torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.module.state_dict(), "epoch": epoch,
            "optimizer": optimizer.state_dict(), "teacher": teacher.state_dict()}, args.output)
"""
SMALL = ["--model", "test_resnet"]
PLAIN = [*SMALL, "--opt", "momentum", "--lr", "0.1", "--epochs", "4", "--warmup-epochs", "0", "--stop", "1"]


def commands():
    """Those that the page shows: what comes after the launcher, with a place for the script."""
    section = (ROOT / "docs/recipes.md").read_text().partition("## ImageNet with timm")[2]
    lines = re.search(r"```bash\n(.*?)```", section, flags=re.S)[1].replace("\\\n", " ").strip().splitlines()
    for words in map(shlex.split, filter(None, lines)):
        words = words[words.index("examples/timm_train.py") + 1:]
        yield [None if word == "pytorch-image-models/train.py" else word for word in words]


# the frames' peak rate in each of them, by the paper's configurations
PUBLISHED = list(zip(commands(), (0.1, 0.1, 0.3, 0.3), strict=True))
each_command = pytest.mark.parametrize("command, rate", PUBLISHED, ids=["resnet50d", "swin", "rsb", "deit3"])


def launch(words, script, *more):
    """The launcher's main() in this process, which is as before afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (timm, "create_model"), (timm.models, "create_model"), (timm.optim, "create_optimizer_v2"),
            (timm.loss, "BinaryCrossEntropy"), (timm.utils.ModelEmaV2, "update"), (timm.utils.ModelEmaV3, "update"),
        ):
            patch.setattr(place, name, getattr(place, name))
        patch.setattr(sys, "path", list(sys.path))
        words = [script if word is None else word for word in words]
        patch.setattr(sys, "argv", [str(word) for word in ("timm_train.py", *words, *more)])
        timm_train.main()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def trained(script, tmp_path):
    """What the script saves at the end of a run, which `words` start."""
    def run(words, *more):
        launch(words, script, "--output", tmp_path / "saved.pt", *more)
        return torch.load(tmp_path / "saved.pt", weights_only=True)

    return run


@each_command
def test_a_command_of_the_page_trains_and_goes_on_as_if_never_stopped(command, rate, trained, tmp_path):
    whole = trained(command, *SMALL, "--stop", 4)
    for key in ("state_dict", "state_dict_ema"):
        assert whole[key]["fc.weight"].shape == (4, 8, 96) and frame_error(whole[key]["fc.weight"]) < 1e-5
    assert whole["teacher"]["fc.weight"].shape == (3, 96)
    groups = whole["optimizer"]["rest"]["param_groups"]
    [frames] = whole["optimizer"]["frames"]["param_groups"]
    assert frames["initial_lr"] * frames["lr_scale"] == pytest.approx(rate) and frames["weight_decay"] == 0
    assert all(frames["lr"] == pytest.approx(frames["lr_scale"] * group["lr"]) for group in groups)
    assert frames["momentum"] == 0.9 and not frames["nesterov"]

    trained(command, *SMALL, "--stop", 2)
    (tmp_path / "saved.pt").rename(tmp_path / "half.pt")
    resumed = trained(command, *SMALL, "--stop", 4, "--resume", tmp_path / "half.pt")
    for key in ("state_dict", "state_dict_ema"):
        assert same(whole[key].values(), resumed[key].values())


def test_an_initial_checkpoint_has_a_linear_head_or_frames(trained, tmp_path):
    model = timm.create_model("test_resnet", num_classes=4)
    torch.save(model.state_dict(), tmp_path / "linear.pt")
    still = [None, *PLAIN, "--lr", "0"]  # leaves every bit
    swapped = trained(still, "--initial-checkpoint", tmp_path / "linear.pt")["state_dict"]
    vectors = torch.nn.functional.normalize(model.fc.weight.double(), dim=-1)[:, None]
    projected = vectors @ swapped["fc.weight"].double().mT
    torch.testing.assert_close(projected.norm(dim=-1), torch.ones(4, 1).double(), rtol=0, atol=1e-6)

    torch.save(swapped, tmp_path / "frames.pt")
    again = trained(still, "--initial-checkpoint", tmp_path / "frames.pt")["state_dict"]
    assert same([swapped["fc.weight"], swapped["conv1.0.weight"]], [again["fc.weight"], again["conv1.0.weight"]])
    with pytest.raises(RuntimeError, match="size mismatch for fc.weight"):
        trained(["--subspace-dim", "3", *still], "--initial-checkpoint", tmp_path / "frames.pt")


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_both_optimisers_take_the_steps_of_ours_for_the_whole_model(opt):
    args = timm_train.arguments(["--frame-lr-factor", "0.5", __file__])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), ts.GrassmannLinear(8, 4, 2))
    models = model, copy.deepcopy(model)
    create = timm_train.optimising(timm.optim.create_optimizer_v2, args)
    one = create(models[0], lr=0.1, opt=opt, weight_decay=0.01, momentum=0.9)
    groups = ts.param_groups(models[1], weight_decay=0.01, frame_lr_factor=0.5, no_decay="*.bias")
    kind, options = {"sgd": (ts.RiemannianSGD, {"momentum": 0.9, "nesterov": True}),
                     "adamw": (ts.RiemannianAdamW, {})}[opt]
    other = kind(groups, lr=0.1, **options)
    x, y = torch.randn(10, 6), torch.arange(10) % 4
    for _ in range(3):
        for m, optimiser in zip(models, (one, other), strict=True):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(m(x), y).backward()
            optimiser.step()
    assert same(models[0].parameters(), models[1].parameters())
    assert not torch.equal(model[1].weight, ts.GrassmannLinear(8, 4, 2).weight)


def test_layer_decay_and_lookahead_are_of_the_other_parameters():
    args = timm_train.arguments([__file__])
    create = timm_train.optimising(timm.optim.create_optimizer_v2, args)
    model = ts.swap_head(timm.create_model("test_vit", num_classes=4), subspace_dim=2)
    frozen = model.pos_embed.requires_grad_(False)
    optimiser = create(model, lr=0.1, opt="lookahead_lamb", weight_decay=0.05, layer_decay=0.5, momentum=0.9)
    *groups, frames = optimiser.param_groups
    assert frames["params"] == [model.head.weight] and model.head.weight.requires_grad
    assert (frames["lr"], frames["lr_scale"], frames["weight_decay"]) == (0.1, 1.0, 0.0)
    assert max(group["lr_scale"] for group in groups) <= 1 and min(group["lr_scale"] for group in groups) < 0.1
    listed = [p for group in optimiser.param_groups for p in group["params"]]
    assert {*listed, frozen} == {*model.parameters()} and len(listed) == len({*listed})
    assert callable(optimiser.sync_lookahead) and optimiser.defaults["lr"] == 0.1


def test_what_cannot_be_is_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit, match="never negative"):
        trained([None, *PLAIN, "--bce-loss"])
    with pytest.raises(ValueError, match="frame_lr_factor"):
        trained(["--frame-lr-factor", "-1", None, *PLAIN])
    with pytest.raises(SystemExit):
        launch([None], tmp_path / "none.py")
    assert "timm's repository" in capsys.readouterr().err


@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="TIMM_TRAIN: the path of timm's train.py")
@each_command
def test_a_command_of_the_page_is_taken_by_timms_own_script(command, rate, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(16):
        folder = tmp_path / ("train" if i < 12 else "validation") / str(i % 4)
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (40, 40), (20 * i, 0, 99)).save(folder / f"{i}.png")
    small = (*SMALL, "--input-size", 3, 32, 32, "--num-classes", 4, "-b", 6, "-j", 0, "--device", "cpu", "--no-aug",
             "--data-dir", tmp_path, "--output", tmp_path, "--experiment", "run", "--aug-repeats", 0, "--model-ema",
             "--warmup-epochs", 0)
    train = Path(os.environ["TIMM_TRAIN"])
    launch(command, train, *small, "--epochs", 1)  # of two steps
    first = (tmp_path / "run/last.pth.tar").rename(tmp_path / "first.pth.tar")
    launch(command, train, *small, "--epochs", 2, "--resume", first)
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = [torch.load(path, weights_only=True) for path in (first, tmp_path / "run/last.pth.tar")]
    assert [whole["epoch"] for whole in saved] == [0, 1]
    for whole in saved:
        assert frame_error(whole["state_dict"]["fc.weight"]) < 1e-5
        assert frame_error(whole["state_dict_ema"]["fc.weight"]) < 1e-5
    assert not same(*([whole["state_dict"]["fc.weight"]] for whole in saved))
