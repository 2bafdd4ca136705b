"""AdamW's moments along a recording: exact, carried from step to step in a codec, or encoded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .recordings import Recording
from .stores import Store

BETA1 = 0.9
BETA2 = (0.95, 0.999)
EPS = 1e-8
#: Rounding is judged with the slower of the two, whose moving average stalls first.
SLOW_BETA2 = max(BETA2)
#: What is measured of a pair: ||u_q - u|| / ||u|| of the exact moments encoded once, mean over the late steps; the same of the moments
#: carried by the codecs from the first step on, over the late and over the early steps; max |u_q| / max |u|, the worst of all steps; share
#: of the non-zero second moments that are stored as zero, mean over the late steps.
METRICS = ("one_shot", "running", "early", "largest", "flushed")


@dataclass(frozen=True)
class Schedule:
    """At which steps (from 1) the updates are compared.

    Args:
        early: at most a tenth into the recording.
        late: in its last third.
        marks: at an eighth, a quarter, half and the end, where the second moment alone is looked at.
    """

    early: tuple[int, ...]
    late: tuple[int, ...]
    marks: tuple[int, ...]

    @classmethod
    def over(cls, steps: int) -> Schedule:
        early = tuple(step for step in (2, 3, 5, 10, 20, 40, 80) if step <= max(2, steps // 10))
        late = tuple(range(steps, steps - steps // 3, -max(1, steps // 36)))[::-1]
        return cls(early, late, tuple(sorted({max(1, steps // part) for part in (8, 4, 2, 1)})))

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({*self.early, *self.late, *self.marks}))


@dataclass
class Track:
    """One moment at the schedule's steps.

    Args:
        running: as the step computes it from what the codec carried there, before it is encoded again.
        once: the exact moment encoded and decoded once.
        stored: the running moment as it is stored after the step.
    """

    running: dict[int, Tensor] = field(default_factory=dict)
    once: dict[int, Tensor] = field(default_factory=dict)
    stored: dict[int, Tensor] = field(default_factory=dict)


def follow(recording: Recording, store: Store, group_size: int, schedule: Schedule, exact: Mapping[int, Tensor] | None) -> Track:
    """The moment carried in `store` from zero through all steps; second moments of all `BETA2` lie one after another.

    Args:
        exact: the float32 moment at the schedule's steps, for `Track.once`; None while it is being computed.
    """
    betas = torch.tensor((BETA1,) if store.signed else BETA2)
    decay = betas.repeat_interleave(recording.grads.shape[1])
    track, state, wanted = Track(), torch.zeros_like(decay), schedule.steps
    for step, grad in enumerate(recording.grads[: schedule.steps[-1]], 1):
        state = decay * state + (1 - decay) * (grad if store.signed else grad.square().repeat(len(BETA2)))
        carried = store.carried(state, group_size, step)
        if step in wanted:
            track.running[step], track.stored[step] = state, carried
            if exact is not None and step in schedule.late:
                track.once[step] = store.carried(exact[step], group_size, step)
        state = carried
    return track


def update(m: Tensor, v: Tensor, step: int, beta2: float) -> Tensor:
    """AdamW's update over the learning rate, m and v already advanced to `step`."""
    return m / (1 - BETA1**step) / ((v / (1 - beta2**step)).sqrt() + EPS)


def _part(moments: Tensor, beta2: float) -> Tensor:
    """The second moments of one beta2."""
    return moments.chunk(len(BETA2))[BETA2.index(beta2)]


def _off(made: Tensor, exact: Tensor) -> float:
    return ((made - exact).norm() / exact.norm()).item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def off(first: Track, second: Track, exact_second: Track, step: int, beta2: float) -> float:
    """Relative error of the update at one step that the second moment's codec alone causes; `first` is exact."""
    m = first.running[step]
    return _off(*(update(m, _part(track.running[step], beta2), step, beta2) for track in (second, exact_second)))


def drift(second: Track, exact_second: Track, step: int, beta2: float) -> float:
    """Median over the non-zero elements of the carried second moment over the exact one, less 1: 0 if it does not stall."""
    carried, exact = (_part(track.running[step], beta2) for track in (second, exact_second))
    return (carried[exact > 0] / exact[exact > 0]).median().item() - 1


def octaves(track: Track, schedule: Schedule, group_size: int) -> Tensor:
    """log2(amax / amin) of every group that holds two non-zero magnitudes or more, at the late steps."""
    found = []
    for step in schedule.late:
        groups = track.running[step].abs().view(-1, group_size)
        low = torch.where(groups > 0, groups, torch.inf).amin(dim=1)
        high = groups.amax(dim=1)
        wide = high > low
        found.append(high[wide].log2() - low[wide].log2())
    return torch.cat(found)


def compare(m: Track, v: Track, exact_m: Track, exact_v: Track, schedule: Schedule, beta2: float) -> dict[str, float]:
    """How far a pair of codecs carries the update off: a value for each of `METRICS`."""
    running, one_shot, largest, flushed = {}, [], 0.0, []
    for step in (*schedule.early, *schedule.late):
        true_v = _part(exact_v.running[step], beta2)
        true = update(exact_m.running[step], true_v, step, beta2)
        made = update(m.running[step], _part(v.running[step], beta2), step, beta2)
        running[step] = _off(made, true)
        largest = max(largest, (made.abs().max() / true.abs().max()).item())
        if step in schedule.late:
            one_shot.append(_off(update(m.once[step], _part(v.once[step], beta2), step, beta2), true))
            alive = true_v > 0
            flushed.append((_part(v.stored[step], beta2)[alive] == 0).float().mean().item())
    found = {
        "one_shot": _mean(one_shot),
        "running": _mean([running[step] for step in schedule.late]),
        "early": _mean([running[step] for step in schedule.early]),
        "largest": largest,
        "flushed": _mean(flushed),
    }
    return {name: found[name] for name in METRICS}
