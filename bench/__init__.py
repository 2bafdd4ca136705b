"""Benchmarks and the accuracy study.

`python -m bench`, `python -m bench.study` and `python -m bench.gpu_check`; README.md says how to read the rows.
"""
