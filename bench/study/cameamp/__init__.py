"""Does CameAMP, with its states in 8 bits, train a LoRA as well as a tuned AdamW?

A tiny FLUX learns photographs of scikit-image, then a LoRA learns one more that it has not seen, as `coat demo` does it. Learning
rates of AdamW and of every profile are tuned alike on a seed of their own; the verdict is on three other seeds.
`python -m bench.study.cameamp` runs it, `report.verdict` judges the recorded rows.
"""
