"""Does training with quantized moments end where training with float32 moments ends?

A byte-level language model on the text of Python's own `pydoc_data.topics`, the same seeds and batches for every
optimizer. `python -m bench.study` runs it, `report.verdict` judges the recorded rows.
"""
