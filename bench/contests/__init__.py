"""The contests of `activation_rows`, a module for each family of ops."""

from ..activation_rows import Contest
from . import activation_quant, tensor_quant

CONTESTS: tuple[Contest, ...] = (
    *activation_quant.CONTESTS,
    *tensor_quant.CONTESTS,
)
