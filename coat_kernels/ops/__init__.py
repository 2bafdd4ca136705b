"""One folder an op: schema and checks, PyTorch reference, CPU and GPU launchers. Importing this registers them with `torch.library`."""

from . import adamw_fp8, gated_residual, group_quant, norm, norm_rope

__all__ = ["adamw_fp8", "gated_residual", "group_quant", "norm", "norm_rope"]
