"""`python -m coat_implementation.benchmark_coat`: the benchmark that guides run as `benchmark_coat.py`, the same as `coat bench model`."""

from coat_train.cli import bench_model
from typer import run

if __name__ == "__main__":
    run(bench_model)
