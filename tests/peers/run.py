"""peft's own tests on `torch_subspace.peft`, from a checkout of peft at the installed version's tag:

    python tests/peers/run.py CHECKOUT [pytest's arguments]        # make peers PEFT=CHECKOUT

"-" stands for the installed version's sdist, which pip downloads. The tests need no network: models are tiny, random
and made here. Nothing is written into the checkout.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import tiny_hub

FILES = ("auto", "config", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models",
         "helpers", "initialization", "low_level_api", "mapping", "mixed", "other", "seq_classifier",
         "target_parameters", "token_classification_qa", "torch_compile", "trainable_tokens", "tuners_utils",
         "vision_models")
WORK = Path(__file__).parents[2] / "build" / "peers"


def main(checkout: str, *args: str) -> int:
    tests = (_sdist() if checkout == "-" else Path(checkout)) / "tests"
    if not (tests / "test_custom_models.py").is_file():
        sys.exit(f"peers: {checkout} is no checkout of peft: it has no tests/test_custom_models.py")
    if (found := _version(tests.parent)) != version("peft"):
        print(f"peers: the checkout is peft {found}, peft {version('peft')} is installed: tests may ask for more")
    shutil.rmtree(WORK / "tests", ignore_errors=True)
    shutil.copytree(tests, WORK / "tests")
    (WORK / "tests" / "__init__.py").touch()
    (WORK / "pytest.ini").write_text("[pytest]\nmarkers =\n single_gpu_tests\n multi_gpu_tests\n bitsandbytes\n")
    tiny_hub.use(WORK / "hub")
    tiny_hub.make(WORK / "hub", tests)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    named = any(a.split("::")[0].endswith(".py") for a in args)
    files = [] if named else [f"tests/test_{name}.py" for name in FILES if (WORK / f"tests/test_{name}.py").exists()]
    return subprocess.call([sys.executable, "-m", "pytest", "-p", "in_loras_place", "-q", "--tb=short", "-rN",
                            "--no-header", "-W", "ignore", *files, *args], cwd=WORK)


def _sdist() -> Path:
    name = f"peft-{version('peft')}"
    if not (WORK / name).is_dir():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft", "-d", str(WORK)]
        subprocess.run([*pip, name.replace("-", "==")], check=True)
        shutil.unpack_archive(WORK / f"{name}.tar.gz", WORK)
    return WORK / name


def _version(checkout: Path) -> str:
    text = (checkout / "src" / "peft" / "__init__.py").read_text()
    return re.search(r"__version__ = \"(.*)\"", text).group(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
