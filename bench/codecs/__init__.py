"""How far does each codec of the moments carry AdamW's update off, on gradients that real training produced?

`python -m bench.codecs` records gradients of the demo's LoRA and of the study's language model, replays them through every pair of codecs
and writes `bench/results/codecs.jsonl` and the page `docs/codecs.md`. The recordings stay in memory.
"""
