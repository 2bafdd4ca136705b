"""The house rules that a program can check: downward imports, one stem through every layer, a true support table, short files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coat_kernels.backends import SUPPORT, backends

ROOT = Path(__file__).parent.parent

#: A module's floor; imports go to a lower floor, or stay inside the same package.
FLOORS = {
    "coat_kernels.formats": 0,
    "coat_kernels._native": 0,
    "coat_kernels._cuda": 0,
    "coat_kernels.backends": 1,
    "coat_kernels.ops": 2,
    "coat_kernels.config": 2,
    "coat_kernels.autograd": 3,
    "coat_kernels.nn": 4,
    "coat_kernels.optim": 4,
    "coat_kernels": 5,
    "coat_train": 6,
    "coat_implementation": 7,
}
FILES = [*(ROOT / "coat_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "python" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def owner(module: str) -> str:
    """The longest entry of FLOORS that holds the module."""
    return max((name for name in FLOORS if module == name or module.startswith(name + ".")), key=len)


def imports(path: Path) -> list[str]:
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            target = ".".join(filter(None, [base, node.module or ""]))
            found += [f"{target}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("coat_kernels", "coat_train", "coat_implementation", "tests", "bench")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    mine = owner(module_name(path))
    for name in imports(path):
        assert name.split(".")[0] not in ("tests", "bench"), f"{name} is not part of the package"
        theirs = owner(name)
        assert theirs == mine or FLOORS[theirs] < FLOORS[mine], f"{module_name(path)} imports {name}, which does not lie below it"


def test_trainers_use_public_names_only() -> None:
    for path in (ROOT / "python").rglob("*.py"):
        for name in imports(path):
            assert not any(part.startswith("_") and part != "__main__" for part in name.split(".")), (
                f"{path.name} imports the private {name}"
            )


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: row.op)
def test_one_stem_through_every_layer(row) -> None:
    folder = ROOT / "coat_kernels/ops" / row.op
    for name in ("__init__.py", "reference.py", "cpu.py"):
        assert (folder / name).exists()
    assert (folder / f"{row.cuda.lower()}.py").exists()
    assert (ROOT / f"csrc/cpu/{row.op}.cpp").exists()
    assert (ROOT / f"tests/ops/test_{row.op}.py").exists()
    assert (ROOT / f"bench/bench_{row.op}.py").exists()


def test_the_readme_table_is_the_support_table() -> None:
    readme = (ROOT / "README.md").read_text()
    for row in SUPPORT:
        assert re.search(rf"\| `{row.op}` \| yes \| {re.escape(row.cpu)} \| {row.cuda} \|", readme), f"README lacks the row of {row.op}"
    assert set(backends()) == {row.op for row in SUPPORT}


def test_the_range_of_a_format_is_written_in_formats_alone() -> None:
    for path in [*FILES, *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]:
        if "formats" not in path.parts:
            assert not re.search(r"\b(448|57344)\b", path.read_text()), f"{path} knows a format's range"


def test_files_stay_readable() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".cpp", ".h", ".cu", ".cuh")):
            assert len((ROOT / name).read_text().splitlines()) <= 500, name


def test_import_needs_neither_triton_nor_the_trainers_libraries() -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('triton', 'diffusers', 'peft', 'transformers', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch, coat_kernels\n"
        "from coat_kernels.optim import FP8AdamW\n"
        "p = torch.nn.Parameter(torch.ones(5000)); p.grad = torch.ones(5000)\n"
        "FP8AdamW([p]).step()\n"
        "assert coat_kernels.backends()['adamw_fp8']['cuda'].startswith('unavailable')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_module_prints_the_table() -> None:
    out = subprocess.run([sys.executable, "-m", "coat_kernels"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "adamw_fp8" in out
    assert "PyTorch" in out
