"""The command `coat`."""

from __future__ import annotations

from coat_train.cli import app
from typer.testing import CliRunner


def test_env_prints_the_backend_table() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert "adamw_fp8" in result.output


def test_a_device_that_is_not_there_is_refused() -> None:
    result = CliRunner().invoke(app, ["demo", "--device", "tpu"])
    assert result.exit_code == 2
    assert "got 'tpu'" in result.output
