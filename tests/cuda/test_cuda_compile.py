"""Every CUDA kernel compiles for every supported GPU on a machine that has none, with nvcc and with NVRTC, and spills no registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from coat_kernels import _cuda

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_nvrtc = pytest.mark.skipif(_cuda._nvrtc() is None, reason="libnvrtc is not found (pip install nvidia-cuda-nvrtc)")
every_target = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
every_source = pytest.mark.parametrize("source", SOURCES)


@needs_nvcc
@every_source
@every_target
def test_nvcc_compiles_without_spills(source: str, capability: tuple[int, int], tmp_path: Path) -> None:
    arch = f"sm_{capability[0]}{capability[1]}"
    command = [str(NVCC), "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", f"-arch={arch}", "-cubin"]
    done = subprocess.run(
        [*command, str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True
    )
    if f"Value '{arch}' is not defined" in done.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert done.returncode == 0, done.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(usage) >= len(kernels(source)), done.stderr
    assert set(usage) == {("0", "0", "0")}, done.stderr


@needs_nvrtc
@every_source
@every_target
def test_nvrtc_compiles_every_kernel(source: str, capability: tuple[int, int]) -> None:
    library = _cuda._nvrtc()
    assert library is not None
    if not _cuda._architecture(library, capability)[1]:
        pytest.skip("this NVRTC does not know the target")
    image = _cuda._compile(library, ROOT / f"csrc/cuda/{source}.cu", capability)
    assert image[:4] == b"\x7fELF"
    for name in kernels(source):
        assert name.encode() in image


def kernels(source: str) -> list[str]:
    """Names of the kernels that launchers ask of a source."""
    text = "\n".join(path.read_text() for path in (ROOT / "coat_kernels/ops").glob("*/cuda.py"))
    plain = re.findall(rf'Kernel\("{source}", "(\w+)"', text)
    steps = [f"step_8bit_{rule}{suffix}" for rule in ("adamw", "lion", "momentum") for suffix in ("", "_float32")]
    return plain + (steps if source == "step_8bit" else [])


@needs_nvrtc
def test_the_image_is_kept_and_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Compiled once for each target and source text, said once; a cache that cannot be written is done without."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO", logger="coat_kernels")
    first = _cuda.compiled("blockwise_quant", (9, 0))
    assert _cuda.compiled("blockwise_quant", (9, 0)) == first and len(caplog.records) == 1
    assert len(list((tmp_path / "coat_kernels").iterdir())) == 1
    _cuda.compiled("blockwise_quant", (8, 6))
    assert len(list((tmp_path / "coat_kernels").iterdir())) == 2

    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc/cuda", copy / "cuda")
    shutil.copytree(ROOT / "csrc/formats", copy / "formats")
    (copy / "cuda/elements.h").write_text((copy / "cuda/elements.h").read_text() + "\n// changed\n")
    monkeypatch.setattr(_cuda, "_SOURCES", copy)
    _cuda.compiled("blockwise_quant", (9, 0))
    assert len(list((tmp_path / "coat_kernels").iterdir())) == 3

    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert _cuda.compiled("blockwise_quant", (9, 0))


@needs_nvrtc
def test_newer_gpus_take_ptx_and_older_ones_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert b".target sm_" in _cuda.compiled("blockwise_quant", (99, 0))
    with pytest.raises(RuntimeError, match=r"compiles for sm_\d+ and later, the GPU is sm_30"):
        _cuda.compiled("blockwise_quant", (3, 0))


@needs_nvrtc
def test_the_compilers_words_are_shown(tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text("this is no C++")
    library = _cuda._nvrtc()
    assert library is not None
    with pytest.raises(RuntimeError, match=r"could not compile bad.cu for sm_90:(.|\n)*error"):
        _cuda._compile(library, tmp_path / "bad.cu", (9, 0))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_cuda, "_FATBINS", tmp_path)
    monkeypatch.setattr(_cuda, "_nvrtc", lambda: None)
    reason = _cuda.unavailable()
    assert reason is not None and "pip install nvidia-cuda-nvrtc" in reason
    with pytest.raises(RuntimeError, match="libnvrtc"):
        _cuda.compiled("blockwise_quant", (9, 0))
    monkeypatch.setattr(_cuda, "_SOURCES", None)
    reason = _cuda.unavailable()
    assert reason is not None and "reinstall" in reason
    (tmp_path / "blockwise_quant.fatbin").touch()
    assert _cuda.unavailable() is None
