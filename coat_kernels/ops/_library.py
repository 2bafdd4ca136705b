"""The `torch.library` namespace that every op of the package registers in."""

from torch.library import Library

LIBRARY = Library("coat_kernels", "FRAGMENT")
