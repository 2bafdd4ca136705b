"""`python bench/benchmark_coat.py`: standard and COAT training side by side, as `coat bench model` does it."""

from coat_train.cli import bench_model
from typer import run

if __name__ == "__main__":
    run(bench_model)
