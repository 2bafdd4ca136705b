"""`torch.autograd.Function` wrappers that save what the backward pass needs in 8 bits, or rebuild it."""
