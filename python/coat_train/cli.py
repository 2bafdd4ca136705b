"""The command `coat`. Subcommands import what they need when they run: `coat --help` stays quick, and works without the extras."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Low-precision training kernels for PyTorch.")


@app.command()
def env() -> None:
    """Print which backend serves which op on this machine."""
    from coat_kernels.__main__ import main

    main()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the picture, the LoRAs and the numbers.")] = Path("output/demo"),
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; more than one pays only on a machine that is otherwise idle.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: shows that everything runs, learns nothing.")] = False,
) -> None:
    """Train a small FLUX on photographs and a LoRA for one more, with torch's AdamW and with FP8AdamW, and compare."""
    import torch
    from rich.console import Console

    console = Console()
    chosen = choose_device(device)
    # The model is small: two threads made a step 1.4 times faster on two idle cores, and 4 times slower beside two other busy processes.
    torch.set_num_threads(threads)
    settle_libraries()
    try:
        from .comparison import DemoError, Settings, run_demo
    except ModuleNotFoundError as error:
        console.print(f"coat demo needs the package {error.name!r}, which is not installed; pip install 'coat-kernels\\[train]' brings it")
        raise typer.Exit(1) from error
    settings = Settings.quick(output, chosen, seed) if quick else Settings(output, chosen, seed)
    try:
        run_demo(settings, console)
    except KeyboardInterrupt:
        console.print(f"Stopped. What was finished is in {output}; nothing resumes from it, so run the same command to start anew.")
        raise typer.Exit(130) from None
    except DemoError as error:
        console.print(f"[red]The demo failed:[/red] {error}")
        raise typer.Exit(1) from error


bench = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure on this machine.")
app.add_typer(bench, name="bench")


@bench.command("model")
def bench_model(
    hidden_size: Annotated[int, typer.Option("--hidden-size", "--hidden_size", help="Width: a multiple of 64, or less.")] = 1024,
    num_layers: Annotated[int, typer.Option("--num-layers", "--num_layers", help="Transformer blocks.")] = 8,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Sequences a step.")] = 4,
    num_steps: Annotated[int, typer.Option("--num-steps", "--num_steps", help="Timed steps.")] = 50,
    seq_len: Annotated[int | None, typer.Option("--seq-len", "--seq_len", help="Tokens a sequence [1024 on a GPU, 128 on a CPU].")] = None,
    use_fp8_activation: Annotated[
        bool, typer.Option("--use-fp8-activation/--no-fp8-activation", "--use_fp8_activation", help="COAT saves activations in FP8.")
    ] = False,
    use_fp8_optimizer: Annotated[
        bool, typer.Option("--use-fp8-optimizer/--no-fp8-optimizer", "--use_fp8_optimizer", help="COAT keeps moments in FP8.")
    ] = True,
    precision: Annotated[str, typer.Option(help="bf16 (autocast over float32 weights) or fp32.")] = "bf16",
    lr: Annotated[float, typer.Option(help="Learning rate of both.")] = 3e-4,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", "--memory_gb", help="What the largest batch must fit in [the GPU's; 24 without one].")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    output: Annotated[Path, typer.Option(help="File for the numbers.")] = Path("benchmark_results.json"),
) -> None:
    """Train a transformer the standard way and with COAT, in turn: memory by part, time of a step, largest batch, losses."""
    from rich.console import Console

    from .benchmark import BenchmarkSettings
    from .benchmark_report import benchmark

    console = Console()
    chosen = choose_device(device)
    try:
        settings = BenchmarkSettings(
            hidden_size=hidden_size,
            num_layers=num_layers,
            batch_size=batch_size,
            num_steps=num_steps,
            seq_len=seq_len,
            use_fp8_optimizer=use_fp8_optimizer,
            use_fp8_activation=use_fp8_activation,
            precision=precision,
            lr=lr,
            memory_gb=memory_gb,
            device=chosen,
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        benchmark(settings, output, console)
    except OSError as error:
        console.print(f"[red]The results cannot be written:[/red] {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("Stopped. Nothing was written.")
        raise typer.Exit(130) from None


def choose_device(device: str) -> str:
    """ "cpu" or "cuda" for what was asked; refuses what this machine does not have."""
    import torch

    available = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if device not in ["auto", *available]:
        raise typer.BadParameter(f"got {device!r}; this machine has {', '.join(available)}; leave the option out to take the best")
    return available[-1] if device == "auto" else device


def settle_libraries() -> None:
    """Quiet what diffusers and transformers log on import about extras that the demo does not use, and keep them off the network."""
    import os

    for variable, value in {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(variable, value)
