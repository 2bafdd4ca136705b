"""Drop-in `torch.nn` modules that save their activations in 8 bits, and the conversion of whole models to them."""
