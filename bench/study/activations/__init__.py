"""Does training with activations and optimizer states in 8 bits end where float32 training ends?

Three works: a LoRA of the tiny FLUX, a velocity model of scikit-learn's digits, and the byte-level language model; the same weights
and batches for every form. Gradients are compared, in the very runs, with those of a plain twin that holds the same weights.
`python -m bench.study.activations` runs it, `report.verdict` judges the recorded rows.
"""
