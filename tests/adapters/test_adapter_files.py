"""Files of Tucker adapters: what they hold, copies, and what a crash leaves."""

import copy
import io
import json
import os
import pickle
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapter_cases import (
    KINDS,
    adapted,
    assert_same_state,
    boxed,
    disturb,
    metadata_of,
    net,
    parts_of,
    relative,
    state_of,
    written,
)
from safetensors.torch import load_file, save_file

import torch_subspace as ts
from torch_subspace.adapters.fingerprint import fingerprint
from torch_subspace.files import write_bytes


class TestRoundTrip:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_onto_a_plain_model(self, kind, path):
        model, inputs, more = adapted(kind, kernel_rank=2, alpha=0.5, dropout=0.0)
        ts.save_adapter(disturb(model), path)
        plain = boxed(kind)[0]
        assert ts.load_adapter(plain, path) is plain
        assert torch.equal(plain(*inputs, **more), model(*inputs, **more))
        assert_same_state(plain.state_dict(), model.state_dict())
        for key, part in parts_of(plain).items():
            assert repr(part) == repr(parts_of(model)[key])

    def test_heads_scales_and_dropout_come_along(self, path):
        model, x = written(path, dropout=0.25, scaling="rslora", rank_pattern={"fc": 3}, alpha_pattern={"stem": 9})
        other = net()[0]
        with torch.no_grad():
            other.head.weight.zero_()  # where the head is read from the file, this does not count
        ts.load_adapter(other, path)
        assert torch.equal(other(x), model(x))
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
        assert parts_of(other)["body.fc.weight"].dropout == 0.25
        for key, part in parts_of(other).items():
            assert (part.scale, part.ranks) == (parts_of(model)[key].scale, parts_of(model)[key].ranks)
        again = path.with_name("again.safetensors")
        ts.save_adapter(other, again)
        assert json.loads(metadata_of(again)["config"]) == json.loads(metadata_of(path)["config"])
        tensors = load_file(path)
        assert all(torch.equal(t, tensors[k]) for k, t in load_file(again).items())
        ts.delete_adapter(other, "default")
        assert not other.head.weight.any()

    def test_the_config_in_the_file_makes_a_config(self, path):
        written(path, rank=(2, 3), kernel_rank=2, exclude_modules="stem", rank_pattern={"fc": (1, 2)})
        config = ts.TuckerConfig(**json.loads(metadata_of(path)["config"])["config"])
        assert tuple(config.rank) == (2, 3) and config.kernel_rank == 2 and config.exclude_modules == ("stem",)
        assert targets_of(ts.adapt(net()[0], config)) == targets_of(ts.load_adapter(net()[0], path))

    def test_only_what_the_adapter_has_is_in_the_file(self, path):
        model, _ = written(path)
        keys = set(load_file(path))
        assert keys == {f"{k}.{n}" for k, p in parts_of(model).items() for n, _ in p.named_parameters()} | {
            "head.weight", "head.bias"}

    def test_names_and_adapters_beside(self, path):
        model, x = written(path)
        other, _ = net()
        ts.adapt(other, ts.TuckerConfig(1, target_modules="stem"), "mine")
        disturb(other, "mine")
        mine = other(x)
        ts.load_adapter(other, path, "theirs")
        assert ts.adapter_names(other) == ["mine", "theirs"] and ts.active_adapters(other) == {"theirs": 1.0}
        assert torch.equal(other(x), model(x))
        ts.set_adapter(other, "mine")
        assert torch.equal(other(x), mine)

    def test_saving_does_not_need_the_adapter_to_be_seen(self, path):
        model, x = written(path)
        want = load_file(path)
        second = path.with_name("second.safetensors")
        ts.adapt(model, ts.TuckerConfig(1, target_modules="fc"), "b")
        ts.save_adapter(model, second)
        found = load_file(second)
        assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)
        ts.set_adapter(model, "default")
        with ts.disabled(model):
            ts.save_adapter(model, second)
        ts.merge(model)
        ts.save_adapter(model, path)
        for file in (path, second):
            assert all(torch.equal(t, want[k]) for k, t in load_file(file).items())

    def test_another_precision(self, path):
        model, x = written(path)
        double = ts.load_adapter(net()[0].double(), path)
        assert relative(model(x), double(x.double())) < 1e-6
        half = ts.load_adapter(net()[0].bfloat16(), path)
        assert relative(half(x.bfloat16()), model(x)) < 0.05

    def test_into_a_wrapped_model(self, path):
        model, x = written(path)
        compiled = torch.compile(net()[0], backend="eager")
        assert ts.load_adapter(compiled, path) is compiled
        assert torch.equal(compiled(x), model(x))
        ts.save_adapter(compiled, path)
        assert torch.equal(ts.load_adapter(net()[0], path)(x), model(x))
        fresh = torch.compile(net()[0], backend="eager")
        assert ts.adapt(fresh, ts.TuckerConfig(2)) is fresh

    def test_replacing_an_adapter_of_other_ranks(self, path):
        model, x = written(path)
        other = net()[0]
        disturb(ts.adapt(other, ts.TuckerConfig(4, target_modules="fc")), seed=7)
        ts.load_adapter(other, path)
        assert torch.equal(other(x), model(x)) and ts.adapter_names(other) == ["default"]
        ts.delete_adapter(other, "default")
        assert torch.equal(other(x), net()[0](x)) and all(p.requires_grad for p in other.parameters())

    def test_replacing_an_adapter_that_trained_a_target_whole(self, path):
        model, x = written(path, save_modules=())  # adapts the head
        other = ts.adapt(net()[0], ts.TuckerConfig(2, save_modules="head"))
        with torch.no_grad():
            other.head.weight.zero_()
        ts.load_adapter(other, path)  # the head is that of before again, with an adapter
        base = net()[0]
        assert torch.equal(other.head._parameters["weight"], base.head.weight)
        twin = ts.load_adapter(base, path)
        assert torch.equal(other(x), twin(x))


def targets_of(model):
    return {k: p.ranks for k, p in parts_of(model).items()}


class TestWriting:
    def test_a_crash_leaves_the_old_file(self, path, monkeypatch):
        model, _ = written(path)
        before = path.read_bytes()
        disturb(model, seed=5)
        for step, error in (("fsync", OSError("no space left on device")), ("replace", KeyboardInterrupt())):
            with monkeypatch.context() as patch:
                patch.setattr(os, step, lambda *args, error=error: (_ for _ in ()).throw(error))
                with pytest.raises(type(error)):
                    ts.save_adapter(model, path)
            assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("step", ["ftruncate", "fsync", "replace"])
    def test_a_killed_process_leaves_one_name_that_the_next_takes_over(self, path, step, monkeypatch):
        model, x = written(path)
        before = path.read_bytes()
        disturb(model, seed=5)
        for _ in range(2):
            child = os.fork()
            if not child:
                monkeypatch.setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
                ts.save_adapter(model, path)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            assert path.read_bytes() == before
            assert sorted(os.listdir(path.parent)) == [path.name, path.name + ".part"]
        ts.save_adapter(model, path)
        assert os.listdir(path.parent) == [path.name]
        assert torch.equal(ts.load_adapter(net()[0], path)(x), model(x))

    def test_savers_at_once_take_turns(self, tmp_path):
        contents = [bytes([i]) * 300_000 for i in range(4)]

        def save(content):
            for _ in range(10):
                write_bytes(tmp_path / "file", content)
                assert (tmp_path / "file").read_bytes() in contents

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(save, contents))
        assert os.listdir(tmp_path) == ["file"]

    def test_a_link_in_the_place_of_the_part_is_not_followed(self, path, tmp_path):
        model, _ = written(path)
        (tmp_path / "other").write_text("mine")
        os.symlink(tmp_path / "other", f"{path}.part")
        with pytest.raises(OSError):
            ts.save_adapter(model, path)
        assert (tmp_path / "other").read_text() == "mine"

    def test_folders_that_cannot_be_written(self, tmp_path):
        model, _ = written(tmp_path / "ok.safetensors")
        with pytest.raises(OSError):
            ts.save_adapter(model, tmp_path / "missing" / "a.safetensors")
        with pytest.raises(OSError):
            ts.save_adapter(model, tmp_path / "ok.safetensors" / "a.safetensors")
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError):
            ts.save_adapter(model, tmp_path / "folder")
        if os.geteuid():
            (tmp_path / "folder").chmod(0o500)
            with pytest.raises(PermissionError):
                ts.save_adapter(model, tmp_path / "folder" / "a.safetensors")
        assert sorted(os.listdir(tmp_path)) == ["folder", "ok.safetensors"]

    def test_paths_and_permissions(self, tmp_path, monkeypatch):
        model, x = written(tmp_path / "a.safetensors")
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
        monkeypatch.chdir(tmp_path)
        ts.save_adapter(model, "b")
        ts.load_adapter(net()[0], str(tmp_path / "b"))
        ts.save_adapter(model, "n" * 250)  # as long as a name may be
        os.symlink("b", "link")
        disturb(model, seed=3)
        ts.save_adapter(model, "link")
        assert torch.equal(ts.load_adapter(net()[0], "link")(x), model(x))


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestCopies:
    @pytest.mark.parametrize("kind", KINDS)
    def test_deepcopy_and_pickle(self, kind):
        model, inputs, more = adapted(kind)
        want = disturb(model)(*inputs, **more)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(twin(*inputs, **more), want)
            disturb(twin, seed=8)
            assert not torch.equal(twin(*inputs, **more), want) and torch.equal(model(*inputs, **more), want)
            ts.delete_adapter(twin, "default")
            assert not any("tucker" in key for m in twin.modules() for key in m.__dict__)

    def test_copies_of_merged_and_half_chosen_models(self, path):
        model, x = written(path)
        ts.adapt(model, ts.TuckerConfig(1, target_modules="fc"), "b")
        disturb(model, "b")
        ts.set_adapter(model, {"default": 0.5, "b": 2})
        want, state = model(x), state_of(model)
        ts.merge(model)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(twin(x), model(x))
        ts.unmerge(twin)
        assert torch.equal(twin(x), want) and ts.active_adapters(twin) == {"default": 0.5, "b": 2.0}
        assert_same_state(twin.state_dict(), state)
        ts.set_adapter(twin, "b")  # its heads came along
        assert torch.equal(twin.head.bias, net()[0].head.bias)

    def test_state_dicts(self):
        model, x = net()
        ts.adapt(model, ts.TuckerConfig(2))
        twin = copy.deepcopy(model)
        disturb(model)
        for assign in (False, True):
            twin.load_state_dict(model.state_dict(), assign=assign)
            assert torch.equal(twin(x), model(x))
        base = net(seed=4)[0].state_dict()
        missing = twin.load_state_dict(base, strict=False)
        assert not missing.unexpected_keys and all(".tucker." in k for k in missing.missing_keys)
        ts.set_adapter(twin, None)
        assert torch.equal(twin(x), net(seed=4)[0](x))


class TestBase:
    """The file knows the weights that its adapter was made on."""

    @pytest.mark.parametrize("saved, loaded", [
        (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ])
    def test_another_precision_is_no_other_base(self, saved, loaded, path):
        model = ts.adapt(net()[0].to(saved), ts.TuckerConfig(2))
        ts.save_adapter(model, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ts.load_adapter(net()[0].to(saved).to(loaded), path)

    @pytest.mark.parametrize("change", [
        lambda m: m.body["fc"].weight.normal_(), lambda m: m.body["fc"].weight.mul_(1.001),
        lambda m: m.body["fc"].weight.add_(1e-4),
    ])
    def test_another_base_warns(self, change, path):
        ts.save_adapter(ts.adapt(net()[0], ts.TuckerConfig(2)), path)
        other, _ = net()
        with torch.no_grad():
            change(other)
        with pytest.warns(UserWarning, match="saved with another base model: 'body.fc' had other weights") as caught:
            ts.load_adapter(other, path)
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="another base model: 'stem' and 3 others"):
            ts.load_adapter(net(1)[0], path)

    def test_merged_trained_and_quantised(self, path):
        model, _ = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        ts.save_adapter(ts.merge(model), path)
        noted = json.loads(metadata_of(path)["config"])["base"]
        assert list(noted) == ["stem", "body.conv", "body.fc", "head"] and len(noted["stem"]["weight"]["values"]) == 8
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ts.load_adapter(net()[0], path)
            ts.load_adapter(model := ts.unmerge(model), path, "again")
        model = net()[0].to("meta")
        assert fingerprint(model.stem, "weight") is None

    def test_files_without(self, path):
        """As those of before are."""
        model, x = written(path)
        about = json.loads(metadata_of(path)["config"])
        assert not about.pop("tied") and about.pop("base")
        save_file(load_file(path), path, metadata_of(path) | {"config": json.dumps(about)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(ts.load_adapter(net()[0], path)(x), model(x))

    @pytest.mark.parametrize("note", [
        {"base": {"stem": {"weight": {"dtype": "float32"}}}}, {"base": {"no": {"weight": None}}}, {"tied": {"a": 1}},
        {"base": {"stem": {"weight": {"dtype": "x", "values": []}}}},
    ])
    def test_notes_that_are_broken(self, note, path):
        written(path)
        about = json.loads(metadata_of(path)["config"]) | note
        save_file(load_file(path), path, metadata_of(path) | {"config": json.dumps(about)})
        with pytest.raises(ValueError, match="truncated or not"):
            ts.load_adapter(net()[0], path)
