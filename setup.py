"""Builds `coat_kernels._C` with CMake; pyproject.toml holds everything else.

Without CMake or a C++17 compiler the package installs without the extension and the PyTorch reference serves.
Set COAT_REQUIRE_NATIVE=1 to make that an error. CUDA kernels are compiled where nvcc is found; their sources are installed in any
case, for NVRTC to compile on the machine that has the GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake and takes the library back."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        if not self.inplace:  # in place they are found where they lie
            for folder in ("cuda", "formats"):
                shutil.copytree(ROOT / "csrc" / folder, target / "csrc" / folder, dirs_exist_ok=True)
        try:
            self._cmake(target, build)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("COAT_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"warning: coat_kernels is installed without its C++ extension ({error}).\n"
                "It needs CMake 3.25 and a C++17 compiler (GCC 9 or Clang 10 onwards); until then the PyTorch reference serves on CPUs.",
                file=sys.stderr,
            )

    def _cmake(self, target: Path, build: Path) -> None:
        import pybind11

        # beside the interpreter first: a virtual environment's tools, though nobody has activated it
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=tools), shutil.which("ninja", path=tools)
        if cmake is None:
            raise FileNotFoundError("cmake is not on the PATH")
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), *generator),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(target)], check=True)


setup(
    ext_modules=[Extension("coat_kernels._C", sources=[], optional=os.environ.get("COAT_REQUIRE_NATIVE") != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
