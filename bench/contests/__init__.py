"""The contests of `activation_rows`, a module for each family of ops."""

from ..activation_rows import Contest
from . import activation, activation_quant, norm, tensor_quant

CONTESTS: tuple[Contest, ...] = (
    *activation_quant.CONTESTS,
    *norm.CONTESTS,
    *tensor_quant.CONTESTS,
    *activation.CONTESTS,
)
