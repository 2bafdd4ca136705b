"""Does every optimizer of the package end, with its states in 8 bits, where it ends with the same states in float32?

Two works: a velocity model of scikit-learn's digits, and the byte-level language model. `python -m bench.study.family` tunes each
optimizer's learning rate in its float32 form, on a seed of its own, then trains both forms on three other seeds, the same weights
and batches for all.
"""
