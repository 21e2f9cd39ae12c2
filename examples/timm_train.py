"""Run timm's train.py with a Grassmann head: on the model, under its optimiser, in its averages and checkpoints.

    git clone https://github.com/huggingface/pytorch-image-models
    python examples/timm_train.py --subspace-dim 8 pytorch-image-models/train.py --data-dir imagenet --model resnet50d

What follows train.py is its own; under torchrun it is the same. The classifier is swapped where train.py makes its
model: before it resumes, averages, compiles or distributes. All parameters but the frames are timm's affair, with any
`--opt`: groups, weight decay, layer decay. The frames take Riemannian steps beside it, without weight decay, at a rate
of `--lr` times `--frame-lr-factor` throughout the schedule; `--clip-grad` counts their gradient like any other.
"""

import argparse
import runpy
import sys
from pathlib import Path

import torch

import torch_subspace as ts


def arguments(words=None):
    """The command line: options of ours, train.py, and what that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--subspace-dim", type=int, default=8, help="dimension of a class's subspace (default: 8)")
    parser.add_argument("--gamma", type=lambda text: text if text == "auto" else float(text), default="auto",
                        help="scale of the logits (default: auto, by the head's sizes; published: 25)")
    parser.add_argument("--frame-opt", choices=("sgd", "adamw"),
                        help="Riemannian steps of this kind (default: adamw where --opt has betas, else sgd)")
    parser.add_argument("--frame-lr-factor", type=float, default=1.0,
                        help="the frames' learning rate as a multiple of --lr (default: 1)")
    parser.add_argument("script", type=Path, metavar="train.py", help="of a checkout of pytorch-image-models")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    args = parser.parse_args(words)
    if not args.script.is_file():
        parser.error(f"no file {args.script}: train.py is in timm's repository, not in its package")
    return args


class WithFrames:
    """timm's optimiser of all other parameters and ours of the frames, as one; it is asked for what isn't here."""

    _step_supports_amp_scaling = False  # GradScaler unscales both

    def __init__(self, rest, frames):
        self.rest, self.frames = rest, frames

    def __getattr__(self, name):
        return getattr(self.rest, name)

    @property
    def param_groups(self):
        """Of both: the same dicts, for schedulers and GradScaler."""
        return [*self.rest.param_groups, *self.frames.param_groups]

    def zero_grad(self, set_to_none=True):
        """As torch's."""
        self.rest.zero_grad(set_to_none)
        self.frames.zero_grad(set_to_none)

    def step(self, closure=None):
        """As torch's; the closure is evaluated once."""
        loss = self.rest.step(closure)
        self.frames.step()
        return loss

    def state_dict(self):
        """Of each."""
        return {"rest": self.rest.state_dict(), "frames": self.frames.state_dict()}

    def load_state_dict(self, state):
        """What `state_dict` gave."""
        self.rest.load_state_dict(state["rest"])
        self.frames.load_state_dict(state["frames"])


def swapping(create, load, args):
    """timm's `create_model`, whose first model has its head swapped. A later one is a teacher."""
    first = True

    def create_model(*words, checkpoint_path=None, **options):
        nonlocal first
        if not first:
            return create(*words, checkpoint_path=checkpoint_path, **options)
        first = False
        model = create(*words, **options)
        linear = False
        if checkpoint_path:
            try:
                load(model, checkpoint_path)
                linear = True  # its class vectors start the frames
            except RuntimeError:
                pass  # it has frames, or is of another model, which the next attempt tells
        ts.swap_head(model, subspace_dim=args.subspace_dim, gamma=args.gamma)
        if checkpoint_path and not linear:
            load(model, checkpoint_path)
        return model

    return create_model


def optimising(create, args):
    """timm's `create_optimizer_v2` for all but frames, and ours beside it."""

    def create_optimizer_v2(model, *, lr, **options):
        groups = ts.param_groups(model, lr=lr, frame_lr_factor=args.frame_lr_factor)
        groups = [group for group in groups if "manifold" in group]
        weights = [p for group in groups for p in group["params"] if p.requires_grad]
        for group in groups:  # timm's schedulers multiply what they make of initial_lr by lr_scale
            group.update(initial_lr=lr, lr_scale=args.frame_lr_factor)
        for p in weights:  # timm leaves out what is frozen
            p.requires_grad_(False)
        rest = create(model, lr=lr, **options)
        for p in weights:
            p.requires_grad_(True)
        if args.frame_opt == "adamw" or args.frame_opt is None and "betas" in rest.defaults:
            frames = ts.RiemannianAdamW(groups, lr, **{key: options[key] for key in ("betas", "eps") if key in options})
        else:
            frames = ts.RiemannianSGD(groups, lr, options["momentum"], nesterov=rest.defaults.get("nesterov", False))
        return WithFrames(rest, frames)

    return create_optimizer_v2


def averaging(update):
    """`update` of timm's averages, which goes entry by entry, and then the nearest frames, by two Newton steps.

    The mean of two frames is off from orthonormal by 4 (1 - decay) at most, and a step squares that or better: no QR is
    needed. In float64, as train.py lets products in float32 be rounded to TF32.
    """

    @torch.no_grad()
    def updated(average, *words, **options):
        update(average, *words, **options)
        for layer in average.module.modules():
            if isinstance(layer, ts.GrassmannLinear):
                w = layer.weight.double()
                for _ in range(2):
                    w = torch.baddbmm(w, w @ w.mT, w, beta=1.5, alpha=-0.5)
                layer.weight.copy_(w)

    return updated


def refused(**options):
    """In the place of timm's binary cross-entropy."""
    sys.exit("timm_train: a subspace's logit is a length, never negative, and its sigmoid at least 1/2: leave out "
             "--bce-loss, and train with softmax cross-entropy")


def prepare(args):
    """Put the above in timm's places, from where train.py takes them."""
    import timm.loss
    import timm.models
    import timm.optim
    import timm.utils

    timm.create_model = timm.models.create_model = swapping(timm.models.create_model, timm.models.load_checkpoint, args)
    timm.optim.create_optimizer_v2 = optimising(timm.optim.create_optimizer_v2, args)
    timm.loss.BinaryCrossEntropy = refused
    for average in (timm.utils.ModelEmaV2, timm.utils.ModelEmaV3):
        average.update = averaging(average.update)


def main():
    """Run train.py as Python would, with its folder first on the path: in a checkout that is the timm beside it."""
    args = arguments()
    sys.path[0] = str(args.script.resolve().parent)
    prepare(args)
    sys.argv = [str(args.script), *args.rest]
    runpy.run_path(str(args.script), run_name="__main__")


if __name__ == "__main__":
    main()
