"""CUDA kernels of `csrc/cuda`: from the build's fatbins, or compiled at first use by NVRTC, and launched through the driver.

A kernel is an `extern "C" __global__` function that takes one structure by value. Two C libraries do the work, both through ctypes:
libcuda, which every machine with a GPU has, and libnvrtc, which torch's CUDA builds bring. `torch.cuda._compile_kernel` goes the same
way, but is private, keeps nothing on disk and passes only tensors, int32 and float64.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_FATBINS = _PACKAGE / "fatbin"
#: The repository's sources, or those an installed package carries.
_SOURCES = next((path for path in (_PACKAGE.parent / "csrc", _PACKAGE / "csrc") if (path / "cuda").is_dir()), None)
#: NVRTC brings no C library: what `csrc/formats` includes of it, in NVRTC's own words.
_C_HEADERS = {
    "cstdint": "typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;\n"
    "typedef int int32_t; typedef unsigned int uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;\n"
    "typedef unsigned long long uintptr_t;\n",
    "cstring": "",
}
_OPTIONS = ("-std=c++17",)
_log = logging.getLogger("coat_kernels")


def unavailable() -> str | None:
    """Why CUDA kernels can be had on no device here, with the remedy; None where they can."""
    if any(_FATBINS.glob("*.fatbin")):
        return None
    if _SOURCES is None:
        return "the package holds neither compiled CUDA kernels nor their sources; reinstall coat-kernels"
    if _nvrtc() is None:
        return (
            "coat-kernels was built without nvcc and libnvrtc, which would compile its CUDA kernels at first use, is not found; "
            "pip install nvidia-cuda-nvrtc, or a CUDA build of torch, which brings it"
        )
    return None


class Kernel:
    """One kernel; callable on every device of the process.

    Args:
        source: stem of its file under `csrc/cuda`.
        name: of the function.
        threads: of a block.
    """

    def __init__(self, source: str, name: str, threads: int) -> None:
        self.source, self.name, self.threads = source, name, threads

    def launch(self, arguments: ctypes.Structure, device: torch.device, blocks: int, *, cooperative: bool = False) -> None:
        """Runs the kernel on `device` and its current stream, without waiting: at most `blocks` blocks, and no more than the device holds
        at once (the kernels walk on to what is left). It can be captured into a CUDA graph, but for the first launch on a device,
        which loads the code.

        Args:
            cooperative: the blocks may wait for each other.

        Raises:
            RuntimeError: the driver or the compiler reports an error.
        """
        if blocks <= 0:
            return
        grid = min(blocks, self.resident_blocks(device))
        with torch.cuda.device(device):
            function, _ = _function(self, torch.cuda.current_device())
            parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            shape = (grid, 1, 1, self.threads, 1, 1, 0)
            if cooperative:
                status = _driver().cuLaunchCooperativeKernel(function, *shape, stream, parameters)
            else:
                status = _driver().cuLaunchKernel(function, *shape, stream, parameters, None)
            _check(status, f"launch {self.name}")

    def resident_blocks(self, device: torch.device) -> int:
        """How many of the kernel's blocks `device` runs at once."""
        with torch.cuda.device(device):
            index = torch.cuda.current_device()
            _bind_context(index)
            return _function(self, index)[1]


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, doing: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"the CUDA driver could not {doing}: {(text.value or b'unknown error').decode()} ({status})")


def _bind_context(device: int) -> None:
    """Makes torch's context current in a thread that has not touched the device yet: the driver, unlike the runtime, does not."""
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "tell the current context")
    if not context:
        _check(_driver().cuDeviceGet(ctypes.byref(handle), device), f"find device {device}")
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"retain the context of device {device}")
        _check(_driver().cuCtxSetCurrent(context), f"bind the context of device {device}")


@cache
def _function(kernel: Kernel, device: int) -> tuple[ctypes.c_void_p, int]:
    """The kernel's handle on a device, and how many of its blocks the device runs at once."""
    module, function, blocks = _module(kernel.source, device), ctypes.c_void_p(), ctypes.c_int()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()), f"find the kernel {kernel.name}")
    occupancy = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor
    _check(occupancy(ctypes.byref(blocks), function, kernel.threads, ctypes.c_size_t(0)), f"query the kernel {kernel.name}")
    return function, max(blocks.value, 1) * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _module(source: str, device: int) -> ctypes.c_void_p:
    fatbin, module = _FATBINS / f"{source}.fatbin", ctypes.c_void_p()
    if fatbin.exists():
        status = _driver().cuModuleLoadData(ctypes.byref(module), fatbin.read_bytes())
        if status == 0:
            return module
        if _SOURCES is None or _nvrtc() is None:
            _check(status, f"load the compiled kernels of {source}")
        # built by a CUDA newer than the driver: torch's own compiler fits the driver that torch runs on
        _log.warning("the driver does not take the compiled kernels of %s (error %d); NVRTC compiles them now", source, status)
    image = compiled(source, torch.cuda.get_device_capability(device))
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), f"load the kernels of {source}")
    return module


def compiled(source: str, capability: tuple[int, int]) -> bytes:
    """The image of `csrc/cuda/<source>.cu` for a compute capability, from the user's cache directory or NVRTC.

    The cache's key is made of the sources, the capability and NVRTC's version; a directory that cannot be written is done without.

    Raises:
        RuntimeError: NVRTC is missing or refuses the source.
    """
    library = _nvrtc()
    if library is None or _SOURCES is None:
        raise RuntimeError(unavailable() or f"libnvrtc, which would compile the CUDA kernels of {source}, is not found")
    files = sorted((_SOURCES / "cuda").glob("*")) + sorted((_SOURCES / "formats").glob("*.h"))
    key = hashlib.sha256(repr((source, capability, _nvrtc_version(library), _OPTIONS, _C_HEADERS)).encode())
    for file in files:
        key.update(file.name.encode() + file.read_bytes())
    cached = _cache_directory() / f"{source}-sm_{capability[0]}{capability[1]}-{key.hexdigest()[:16]}"
    with suppress(OSError):
        return cached.read_bytes()
    _log.info("compiling the CUDA kernels of %s for sm_%d%d (once; kept in %s)", source, *capability, cached.parent)
    image = _compile(library, _SOURCES / "cuda" / f"{source}.cu", capability)
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        # written aside and renamed: another process may be reading
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as aside:
            aside.write(image)
        os.replace(aside.name, cached)
    return image


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "coat_kernels")


@lru_cache
def _nvrtc() -> ctypes.CDLL | None:
    """libnvrtc of torch's CUDA version: loaded already, on the loader's path, or in NVIDIA's wheels."""
    majors = [torch.version.cuda.split(".")[0]] if torch.version.cuda else ["13", "12"]
    wheels = find_spec("nvidia")
    folders = [Path(root) for root in (wheels.submodule_search_locations or []) if wheels] if wheels else []
    for major in majors:
        name = f"libnvrtc.so.{major}"
        for candidate in (name, *(str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{name}")))):
            with suppress(OSError):
                return ctypes.CDLL(candidate)
    return None


def _nvrtc_version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _architecture(library: ctypes.CDLL, capability: tuple[int, int]) -> tuple[str, bool]:
    """NVRTC's target for a GPU, and whether it is machine code; of GPUs newer than NVRTC the driver translates PTX."""
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(known)
    wanted = 10 * capability[0] + capability[1]
    if wanted in list(known):
        return f"sm_{wanted}", True
    older = [arch for arch in known if arch < wanted]
    if not older:
        raise RuntimeError(
            f"NVRTC {'.'.join(map(str, _nvrtc_version(library)))} compiles for sm_{min(known)} and later, the GPU is sm_{wanted}"
        )
    return f"compute_{max(older)}", False


def _compile(library: ctypes.CDLL, file: Path, capability: tuple[int, int]) -> bytes:
    target, machine_code = _architecture(library, capability)
    program = ctypes.c_void_p()
    names, texts = ((ctypes.c_char_p * len(_C_HEADERS))(*(s.encode() for s in strings)) for strings in (_C_HEADERS, _C_HEADERS.values()))
    options = [f"--gpu-architecture={target}", f"-I{file.parent}", *_OPTIONS]
    library.nvrtcCreateProgram(ctypes.byref(program), file.read_bytes(), file.name.encode(), len(_C_HEADERS), texts, names)
    try:
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
        if status != 0:
            raise RuntimeError(f"NVRTC could not compile {file.name} for {target}:\n{_output(library, program, 'ProgramLog').decode()}")
        return _output(library, program, "CUBIN" if machine_code else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _output(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
