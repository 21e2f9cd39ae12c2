"""A model with our head and adapters, packaged by examples/serve.py: it runs in Python without this package, and by
examples/serve.c without Python. One export and one compilation do for all checks of a package: they take seconds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import close, optional

import torch_subspace as ts

needs_compilers = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("g++")), reason="no C and C++ compiler")

# run where torch_subspace has not been imported, and is not needed
ELSEWHERE = """
import sys, torch
program, images, logits = sys.argv[1:]
with torch.no_grad():
    torch.save(torch.export.load(program).module()(torch.load(images)), logits)
assert "torch_subspace" not in sys.modules
"""


@pytest.fixture
def serve(monkeypatch):
    optional("sklearn")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples")
    import serve

    return serve


def model_of(serve):
    """With an adapter of a convolution and one of a linear layer, neither of them zero."""
    torch.manual_seed(0)
    ts.adapt(model := serve.classifier(), ts.TuckerConfig(rank=4, target_modules=["2", "5"]))
    for p in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def answers(text):
    return torch.tensor([[float(word) for word in line.split()] for line in text.splitlines()]).T


@pytest.mark.slow
@needs_compilers
def test_a_package_runs_without_us_and_without_python(serve, tmp_path):
    model, images = model_of(serve), torch.randn(71, *serve.SHAPE)
    host, package, program, inputs, outputs = (tmp_path / name for name in ("host", "a.pt2", "b.pt2", "in", "out"))
    with torch._inductor.config.patch({"aot_inductor.precompile_headers": False}):  # one model does not pay for them
        torch.export.save(serve.package(model, serve.SHAPE, package), program)
    torch.save(images, inputs)
    with torch.no_grad():
        expected = model(images)
        compiled = torch._inductor.aoti_load_package(str(package))(images)
    assert (expected - expected[:1]).abs().max() > 0.1
    subprocess.run([sys.executable, "-c", ELSEWHERE, program, inputs, outputs], check=True)
    close((compiled, torch.load(outputs)), (expected, expected), 1e-5)

    serve.build(host)
    raw = images.numpy().tobytes()
    with subprocess.Popen([host, package], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(raw[: 64 * 256])  # a batch for serve.c; what is left is a smaller one
        process.stdin.flush()
        said = [process.stdout.readline() for _ in range(64)]
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        said.append(process.communicate(raw[64 * 256 :])[0])
    assert process.returncode == 0
    libraries = {line.rpartition("/")[2] for line in maps.splitlines() if "/" in line}
    assert "libtorch_cpu.so" in libraries and not [name for name in libraries if "python" in name or "subspace" in name]
    classes, probabilities = answers(b"".join(said).decode())
    best = expected.softmax(-1).max(-1)
    assert torch.equal(classes.long(), best.indices)
    torch.testing.assert_close(probabilities, best.values, rtol=0, atol=1e-5)

    def refused(stdin):
        done = subprocess.run([host, package], input=stdin, capture_output=True)
        return done.returncode, done.stderr.decode().splitlines()[-1:]

    assert refused(raw[:300]) == (1, ["serve: the last image, of 1x8x8, is not whole: it has 44 bytes of 256"])
    images[3, 0, 2, 2] = torch.nan
    assert refused(images.numpy().tobytes()) == (1, ["serve: the logits of image 3 are not finite"])
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(tmp_path / "c.pt2", "w") as new:  # says another shape
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'"image": "1x8x8"', b'"image": "1x4x4"'))
    package = tmp_path / "c.pt2"
    assert refused(raw) == (1, ["serve: the model does not run on images of 1x4x4; torch says above why"])


def member(name, data=b"no library"):
    def write(path):
        with zipfile.ZipFile(path, "w") as package:
            package.writestr("a/data/aotinductor/model/c.wrapper_metadata.json", '{"image": "1x8x8"}')
            package.writestr(f"a/data/aotinductor/model/{name}", data)
        return path

    return write


def changed(change):
    def write(path):
        whole = member("c.wrapper.so")(path).read_bytes()
        path.write_bytes(change(whole))

    return write


BROKEN = {
    "can't be read: No such file": lambda path: None,
    "is no package, or not a whole one": changed(lambda whole: whole[:200]),
    "is damaged: its checksum is wrong": changed(lambda whole: whole.replace(b"no library", b"no librarx")),
    "is damaged: its directory is": changed(lambda whole: whole.replace(b"PK\1\2", b"PK\1\3")),
    "calls operators that torch's C ABI does not reach": member("c.wrapper.json", b"[]"),
    "does not fit this torch or this processor": member("c.wrapper.so"),
}


@needs_compilers
def test_the_host_refuses_what_is_no_package(serve, tmp_path):
    serve.build(tmp_path / "host")
    for i, (reason, write) in enumerate(BROKEN.items()):
        write(path := tmp_path / f"{i}.pt2")
        done = subprocess.run([tmp_path / "host", path], input=b"", capture_output=True)
        assert done.returncode == 1 and done.stdout == b"", reason
        assert done.stderr.decode().startswith(f"serve: {path}") and reason in done.stderr.decode()
