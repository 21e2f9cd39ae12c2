"""Trainers of others: a run that is interrupted goes on with the bits of one that is not. test_docs runs the page."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import optional, same
from torch import nn

import torch_subspace as ts

PAGE = Path(__file__).resolve().parents[1] / "docs/tools.md"


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.1), ts.GrassmannLinear(32, 5, (1, 2, 3, 2, 1)))


@pytest.mark.slow
def test_trainer_resumes_with_the_same_bits(tmp_path):
    transformers = optional("transformers")
    optional("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = classifier()

        def forward(self, x, labels):
            z = self.net[:2](x)
            return {"loss": self.net[2].loss(z, labels, label_smoothing=0.1), "logits": self.net[2](z)}

    g = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(20, generator=g), "labels": i % 5} for i in range(40)]
    seen = []

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, *, model, optimizer, **rest):
            seen.append(getattr(optimizer, "optimizer", optimizer).skipped_frames)

    def run(steps, resume=None):
        model = Model()
        opt = ts.RiemannianAdamW(ts.param_groups(model, weight_decay=0.01), lr=0.01, amsgrad=True)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=4,
            max_grad_norm=1.0, report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no")
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(opt, None),
                                       callbacks=[Steps()])
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / f"checkpoint-{steps}"))
        return model

    whole = run(6)
    again = run(3, resume=True)
    assert same(again.parameters(), whole.parameters())
    assert seen == [0] * 9
    assert whole.net[2].frame_error() < 1e-5


def test_accelerate_resumes_with_the_same_bits(tmp_path):
    accelerate = optional("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # what the page's example has left in this process, as its own
    accelerate.state.GradientState._reset_state()         # tests do
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    x, y = torch.randn(8, 4, 20, generator=torch.Generator().manual_seed(1)), torch.arange(4)

    def prepared():
        model = classifier()
        opt = ts.RiemannianSGD(ts.param_groups(model, weight_decay=0.01), lr=0.1, momentum=0.9)
        return accelerator.prepare(model, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9))

    def train(model, opt, scheduler, steps):
        for i in steps:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x[i]), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                scheduler.step()
                opt.zero_grad()

    run = prepared()
    train(*run, range(4))
    accelerator.save_state(str(tmp_path))
    train(*run, range(4, 8))
    expected = [p.detach().clone() for p in run[0].parameters()]
    accelerator.load_state(str(tmp_path))
    train(*run, range(4, 8))
    assert same(run[0].parameters(), expected)

    accelerator.free_memory()
    again = prepared()
    accelerator.load_state(str(tmp_path))
    train(*again, range(4, 8))
    assert same(again[0].parameters(), expected)
    assert again[0][2].frame_error() < 1e-5


def test_lightning_trains_the_example_of_the_page():
    optional("lightning")
    section = PAGE.read_text().partition("## Lightning")[2]
    code = "\n".join(re.findall(r"^(?: {4}.*)?$", section, flags=re.M))
    exec(compile(textwrap.dedent(code), str(PAGE), "exec"), {"__name__": "page"})
