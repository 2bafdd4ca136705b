"""What the rows say: the page `docs/codecs.md` and the plot."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..report import heading
from ..timing import QUIET_CORES
from .measure import WIDTH_QUANTILES, cell
from .replay import BETA2, METRICS, SLOW_BETA2
from .stores import DEFAULT_GROUP_SIZE, GROUP_SIZES

Key = tuple[str, str, int | None]

_BETAS = " / ".join(f"{beta2:g}" for beta2 in BETA2)

#: Recordings of real training, which the ranking goes by; the synthetic one is a control.
REAL = ("lora", "language", "straddling")
RECORDINGS = (*REAL, "synthetic")
COAT: Key = ("e4m3_expand", "e4m3_expand", 128)
RECOMMENDED: Key = ("e4m3_expand", "log8, stochastic", 128)
#: For who can spare a few more bytes, and the same first moment in groups that hold more than one row.
FINE: Key = ("softsign8", "log8, stochastic", 32)
WIDE: Key = ("softsign8", "log8, stochastic", 128)
DYNAMIC: Key = ("dynamic8", "dynamic8", 256)
#: Shown beside the best for their bytes, whether they are among them or not.
LANDMARKS: tuple[Key, ...] = (
    COAT,
    RECOMMENDED,
    FINE,
    WIDE,
    DYNAMIC,
    ("e4m3_expand", "e4m3_expand, stochastic", 128),
    ("bfloat16", "bfloat16", None),
    ("float32", "float32", None),
)


def key(row: dict) -> Key:
    return row["m"], row["v"], row["group_size"]


def of_kind(rows: Sequence[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["kind"] == kind]


def pairs(rows: Sequence[dict]) -> dict[Key, dict]:
    return {key(row): row for row in of_kind(rows, "pair")}


def metric(row: dict, name: str, recordings: Sequence[str] = REAL, betas: Sequence[float] = BETA2) -> list[float]:
    """One metric of a row in the chosen cells."""
    return [row["cells"][cell(recording, beta2)][METRICS.index(name)] for recording in recordings for beta2 in betas]


def geometric_mean(values: Sequence[float]) -> float:
    return 0.0 if min(values) <= 0 else statistics.geometric_mean(values)


def score(row: dict) -> float:
    """Running update error: geometric mean over the real recordings and both beta2."""
    return geometric_mean(metric(row, "running"))


def has_step(row: dict) -> bool:
    """Whether an optimizer of the package keeps this pair: dynamic8 goes with itself alone, controls with none."""
    return not row["control"] and (row["m"] == "dynamic8") == (row["v"] == "dynamic8")


def best_for_bytes(rows: Sequence[dict]) -> list[dict]:
    """The pairs with a step that none with as few bytes beats, from few bytes to many."""
    front: list[dict] = []
    for row in sorted(filter(has_step, pairs(rows).values()), key=lambda row: (row["bytes"], score(row))):
        if not front or score(row) < score(front[-1]):
            front.append(row)
    return front


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    parts = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*parts, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 140, break_long_words=False, break_on_hyphens=False) + "\n"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _speed(rows: Sequence[dict]) -> dict[Key, str]:
    return {key(row): f"{row['ratio']:.2f}" for row in of_kind(rows, "speed")}


def _pair_line(row: dict, speed: dict[Key, str], note: str) -> list[str]:
    return [
        f"{row['bytes']:.2f}",
        row["m"],
        row["v"],
        str(row["group_size"] or "-"),
        *(" / ".join(_number(value) for value in metric(row, "running", [recording])) for recording in RECORDINGS),
        _number(geometric_mean(metric(row, "one_shot"))),
        _number(max(metric(row, "largest"))),
        speed.get((row["m"], row["v"], row["group_size"] or DEFAULT_GROUP_SIZE), "-"),
        note,
    ]


def _pairs_section(rows: Sequence[dict]) -> str:
    found, front, speed = pairs(rows), best_for_bytes(rows), _speed(rows)
    shown = {key(row): row for row in front} | {landmark: found[landmark] for landmark in LANDMARKS if landmark in found}
    best = {key(row) for row in front}
    notes = {COAT: "COAT's pair, the default", RECOMMENDED: "**recommended**", DYNAMIC: "bitsandbytes' map"}
    lines = []
    for name, row in sorted(shown.items(), key=lambda item: (item[1]["bytes"], score(item[1]))):
        note = "; ".join(filter(None, (notes.get(name, ""), "best for its bytes" if name in best else "")))
        lines.append(_pair_line(row, speed, note))
    header = ["bytes", "m", "v", "group", *RECORDINGS]
    return _table([*header, "one-shot", "largest", "CPU time", ""], lines)


def _alone(rows: Sequence[dict], moment: str) -> str:
    """One moment's codecs beside a float32 other moment, by group size."""
    found = pairs(rows)
    names = list(dict.fromkeys(row[moment] for row in found.values() if not row["control"]))
    lines = []
    for name in names[1:]:
        line = [name]
        for size in GROUP_SIZES:
            pair = (name, "float32") if moment == "m" else ("float32", name)
            row = found.get((*pair, size)) or found.get((*pair, None))
            by_beta = [geometric_mean(metric(row, "running", betas=[beta2])) for beta2 in BETA2] if row else []
            # the first moment does not know beta2
            line.append("-" if not row else _number(geometric_mean(by_beta)) if moment == "m" else " / ".join(map(_number, by_beta)))
        lines.append(line)
    return _table([{"m": "first moment", "v": "second moment"}[moment], *(f"groups of {size}" for size in GROUP_SIZES)], lines)


def _rounding_section(rows: Sequence[dict]) -> str:
    found = [row for row in of_kind(rows, "rounding") if row["recording"] in REAL]
    lines = []
    for v, rounding in dict.fromkeys((row["v"], row["rounding"]) for row in found):
        line = [v, rounding]
        for recording in REAL:
            row = next(row for row in found if (row["v"], row["rounding"], row["recording"]) == (v, rounding, recording))
            line += [" ".join(map(_number, row["error"])), f"{row['drift'][-1]:+.1%}"]
        lines.append(line)
    steps = {row["recording"]: ", ".join(map(str, row["steps"])) for row in found}
    columns = [text for recording in REAL for text in (f"{recording}: error at step {steps[recording]}", "v drifts by")]
    return _table(["v", "rounding", *columns], lines)


def _control_section(rows: Sequence[dict]) -> str:
    found = pairs(rows)
    lines = []
    for v in ("e4m3", "dynamic8"):
        for name in (v, f"{v}, flushes"):
            row = found["float32", name, DEFAULT_GROUP_SIZE]
            lines.append([name, *(_number(max(metric(row, name, [r]))) for name in ("flushed", "largest") for r in RECORDINGS)])
    return _table(["v", *(f"share of v = 0, {r}" for r in RECORDINGS), *(f"largest update, {r}" for r in RECORDINGS)], lines)


def _range_section(rows: Sequence[dict]) -> str:
    lines = []
    for row in of_kind(rows, "range_cap"):
        errors = (" / ".join(_number(value) for value in metric(row, "running", [recording])) for recording in RECORDINGS)
        lines.append([f"{row['octaves']}{' (used)' if row['used'] else ''}", *errors])
    return _table(["cut at octaves", *RECORDINGS], lines)


def _width_section(rows: Sequence[dict]) -> str:
    found = [row for row in of_kind(rows, "width") if row["group_size"] == DEFAULT_GROUP_SIZE]
    lines = [[row["recording"], row["moment"], *(f"{value:.0f}" for value in row["quantiles"])] for row in found]
    return _table(["recording", "moment", *("widest" if q == 1 else f"{q:.0%} within" for q in WIDTH_QUANTILES)], lines)


def _recommendation(rows: Sequence[dict]) -> str:
    """Three sentences."""
    found, speed = pairs(rows), _speed(rows)
    chosen, coat, fine, wide, dynamic = (found[pair] for pair in (RECOMMENDED, COAT, FINE, WIDE, DYNAMIC))
    cells = list(zip(metric(chosen, "running"), metric(coat, "running"), strict=True))
    time = f", in {speed[RECOMMENDED]} of its CPU time" if RECOMMENDED in speed else ""
    lost, kept = (_number(max(metric(row, "running", ["straddling"]))) for row in (wide, chosen))
    text = _RECOMMENDATION.format(
        m=chosen["m"],
        v=chosen["v"],
        group_size=chosen["group_size"],
        size=chosen["bytes"],
        error=_number(score(chosen)),
        lower=f"{sum(mine < theirs for mine, theirs in cells)} of {len(cells)}",
        times=_number(score(coat) / score(chosen)),
        coat=f"{_number(score(coat))} of COAT's pair (e4m3 with expansion in both, {coat['bytes']:.2f} bytes",
        dynamic=f"{_number(score(dynamic))}, {dynamic['bytes']:.2f}",
        time=time,
        fine=f"`{fine['m']}` for the first moment in groups of {fine['group_size']} makes it {_number(score(fine))} at {fine['bytes']:.2f}",
        wide=f"in groups of {wide['group_size']} it loses rows beside much larger ones in a group (`straddling`: {lost}, not {kept})",
    )
    return _wrapped(text)


_RECOMMENDATION = """\
**Recommended: `{m}` for the first and `{v}` for the second moment, groups of {group_size}.** At {size:.2f} bytes a parameter the running
update error is {error}, lower in {lower} cells and {times} times lower on average than the {coat};
bitsandbytes' map in both: {dynamic}){time}. {fine} bytes; {wide}.
"""

_METHOD = """\
The moments of AdamW (beta1 = 0.9, eps = 1e-8) go from step to step in a codec, as in the fused step, beside float32 moments of the same
gradients. *Running* is ||u_q - u|| / ||u|| of the update u = m / (sqrt(v) + eps), mean over the last third of the steps; *one-shot* the
same of exact moments encoded once; *largest* the worst max |u_q| / max |u| of all steps. Two figures in a cell are beta2 = {betas}.
Pairs that an optimizer of the package keeps are ranked by the geometric mean of running over {ranked} and both beta2: *one-shot* is that
mean too, *largest* the maximum. *CPU time* is that of the fused step on float32 parameters, one thread, over that with COAT's
pair{shared}; - where there is no C++ step.
"""

_ROUNDING = """\
With beta2 = {beta2:g} a step changes v by a thousandth, less than half a code, and rounding to nearest loses it: v cannot follow gradients
that shrink. Running error beside a float32 first moment in groups of {group_size}, and *drift*: the median of the carried v over the exact
one at the last step, less 1.
"""

_RANGE = """\
Octaves between the largest and the smallest non-zero magnitude of a group of {group_size}, and the running error of COAT's pair where wider
groups are cut:
"""


def _method(rows: Sequence[dict]) -> str:
    busy = max((row["other_cores"] or 0 for row in of_kind(rows, "speed")), default=0)
    shared = f" ({busy:.1f} cores were busy with other work)" if busy > QUIET_CORES else ""
    return _wrapped(_METHOD.format(betas=_BETAS, ranked=", ".join(REAL), shared=shared))


def markdown(rows: Sequence[dict]) -> str:
    """The page."""
    environment = of_kind(rows, "environment")[0]
    recordings = [[r["recording"], r["what"], str(r["steps"]), str(r["elements"])] for r in of_kind(rows, "recording")]
    parts = [
        "# Which codec for the moments\n",
        "Measured on recorded gradients by `python -m bench.codecs`, which writes this page. "
        f"All {len(pairs(rows))} pairs with every figure: [codecs.jsonl](../bench/results/codecs.jsonl).\n",
        _recommendation(rows),
        "## What was measured\n",
        _table(["recording", "gradients of", "steps", "elements"], recordings),
        _method(rows),
        "## Best for their bytes, and landmarks\n",
        _pairs_section(rows),
        "![error against bytes](../bench/results/codecs.png)\n",
        "## Each moment alone\n",
        f"Running error with the other moment in float32; second moments: beta2 = {_BETAS}.\n",
        _alone(rows, "m"),
        _alone(rows, "v"),
        "## Rounding of the second moment\n",
        _ROUNDING.format(beta2=SLOW_BETA2, group_size=DEFAULT_GROUP_SIZE),
        _rounding_section(rows),
        "## No second moment may become zero\n",
        "A step gives a non-zero v at least the smallest code. The same codes with v rounded to zero where that is nearest (*flushes*):\n",
        _control_section(rows),
        "## Where a group's range is cut\n",
        _RANGE.format(group_size=DEFAULT_GROUP_SIZE),
        _width_section(rows),
        _range_section(rows),
        f"{heading(environment)}; {environment['date'][:10]}.\n",
    ]
    return "\n".join(parts)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Every pair's error against its bytes, with the best and the landmarks named."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [row for row in pairs(rows).values() if has_step(row) and score(row) > 0]
    front = [row for row in best_for_bytes(rows) if score(row) > 0]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.scatter([row["bytes"] for row in found], [score(row) for row in found], s=8, color="#b8c2cc")
    axis.step([row["bytes"] for row in front], [score(row) for row in front], where="post", color="#4c72b0", linewidth=1)
    for i, row in enumerate(sorted((row for row in found if key(row) in LANDMARKS), key=score)):
        axis.scatter(row["bytes"], score(row), s=30, color="#c44e52" if key(row) == RECOMMENDED else "black", zorder=3)
        label = f"{row['m']} + {row['v']}" + (f", groups of {row['group_size']}" if row["group_size"] else "")
        # neighbours on opposite sides: five of the landmarks take 2.03 to 2.08 bytes
        place = {"xytext": (-6, -3), "ha": "right"} if i % 2 else {"xytext": (6, -3)}
        axis.annotate(label, (row["bytes"], score(row)), textcoords="offset points", fontsize=7, **place)
    axis.set(xscale="log", yscale="log", xlabel="bytes a parameter, both moments", ylabel="running update error", ylim=(2e-3, 2))
    ticks = (1, 1.5, 2, 3, 4, 6, 8)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
