"""Training with coat_kernels: the demo, and the parts that trainers share."""
