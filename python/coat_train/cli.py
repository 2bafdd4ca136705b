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
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if device not in ["auto", *available]:
        raise typer.BadParameter(f"got {device!r}; this machine has {', '.join(available)}; leave the option out to take the best")
    # The model is small: two threads made a step 1.4 times faster on two idle cores, and 4 times slower beside two other busy processes.
    torch.set_num_threads(threads)
    settle_libraries()
    try:
        from .comparison import DemoError, Settings, run_demo
    except ModuleNotFoundError as error:
        console.print(f"coat demo needs the package {error.name!r}, which is not installed; pip install 'coat-kernels\\[train]' brings it")
        raise typer.Exit(1) from error
    chosen = available[-1] if device == "auto" else device
    settings = Settings.quick(output, chosen, seed) if quick else Settings(output, chosen, seed)
    try:
        run_demo(settings, console)
    except KeyboardInterrupt:
        console.print(f"Stopped. What was finished is in {output}; nothing resumes from it, so run the same command to start anew.")
        raise typer.Exit(130) from None
    except DemoError as error:
        console.print(f"[red]The demo failed:[/red] {error}")
        raise typer.Exit(1) from error


def settle_libraries() -> None:
    """Quiet what diffusers and transformers log on import about extras that the demo does not use, and keep them off the network."""
    import os

    for variable, value in {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(variable, value)
