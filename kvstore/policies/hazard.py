"""How likely objects are to be used again, learnt while running: by class and by the time since their last use.

A *life* of an object begins at a use and ends at the next one, whether it is still stored then or not. For each class
and each age, the hazard is the number of lives that ended at that age over the time that lives spent at it (the
occurrence/exposure rate of survival analysis), so lives that have not ended yet are accounted for exactly.

What a life is worth to a cache is its *Gittins index*: the most hits per unit of time that holding it from its present
age on can earn, over every age at which one might give up (Gittins 1979). Evicting the lowest index first is the
optimal way to share a capacity among independent lives whose hazards are known. Classes with few lives lean on those
like them: the hazard of a group, times what the class's kind does to it in all groups.

Time is counted in uses of objects, so a trace replayed without its timing teaches the same as the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Ages are told apart by octaves, from the first bound on.
AGE_BOUND_FIRST = 16
AGES = 24
EPOCHS = 2048
EPOCH_TIME_FIRST = 32
#: Lives are followed until they are this many times as old as the residents are many.
HORIZON_RESIDENTS = 64
#: Uses that the hazards of a group, and of a class, must be based on to count as much as the rougher estimate.
GROUP_PRIOR_USES = 256.0
CLASS_PRIOR_USES = 2048.0
#: Without evidence, an age has this share of the hazard of the age before it, an octave younger.
FALL = 0.5
#: What was learnt counts half after this time: a few hours of a busy node, or a few turnovers of a large one.
HALF_LIFE = 1 << 19
HALF_LIFE_RESIDENTS = 4


class Hazard:
    """Of groups × kinds of lives: a class is group · kinds + kind."""

    def __init__(self, group_priors: Sequence[float], kinds: int) -> None:
        """`group_priors`: hazards of the groups, relative to all lives, to begin with."""
        groups = len(group_priors)
        classes = groups * kinds
        self._group_priors = np.array(group_priors)[:, None]
        self._shape = (groups, kinds, AGES)
        self._bounds = np.concatenate([[0.0], AGE_BOUND_FIRST * 2.0 ** np.arange(AGES - 1)])
        self._spans = np.diff(np.append(self._bounds, 2 * self._bounds[-1]))
        self._uses = np.zeros((classes, AGES))
        self._exposure = np.zeros((classes, AGES))
        #: lives that go on, by class and the epoch of their beginning; the present epoch is number `_epoch`
        self._going_on = np.zeros((classes, EPOCHS))
        self._epoch = 0
        self._epoch_time = EPOCH_TIME_FIRST
        self._first_time = 0

    def ages(self, times: Indices) -> Indices:
        """The number of the age that each length of time is in."""
        return np.searchsorted(self._bounds, times, side="right") - 1

    def begin(self, classes: Indices) -> None:
        """Lives begin now."""
        np.add.at(self._going_on.reshape(-1), classes * EPOCHS + self._epoch, 1.0)

    def end(self, classes: Indices, began: Indices, now: int) -> None:
        """Lives ended by a use. `began`: their times of beginning."""
        epochs = (began - self._first_time) // self._epoch_time
        known = epochs >= 0
        if not known.all():
            classes, began, epochs = classes[known], began[known], epochs[known]
        # By one index a number, which NumPy does several times as fast as by two.
        np.subtract.at(self._going_on.reshape(-1), classes * EPOCHS + epochs, 1.0)
        np.add.at(self._uses.reshape(-1), classes * AGES + self.ages(now - began), 1.0)

    def pass_time(self, now: int, residents: int) -> None:
        """Accounts for the time that lives went through up to `now`."""
        while now - self._first_time >= (self._epoch + 1) * self._epoch_time:
            self._close_epoch(residents)

    def _close_epoch(self, residents: int) -> None:
        youngest_first = self._going_on[:, self._epoch :: -1]
        middles = (np.arange(self._epoch + 1) + 0.5) * self._epoch_time
        cuts = np.append(np.searchsorted(middles, self._bounds), self._epoch + 1)
        ages = np.flatnonzero(np.diff(cuts))  # those that any epoch is in
        self._exposure[:, ages] += np.add.reduceat(youngest_first, cuts[ages], axis=1) * self._epoch_time
        decay = 0.5 ** (self._epoch_time / max(HALF_LIFE, HALF_LIFE_RESIDENTS * residents))
        self._uses *= decay
        self._exposure *= decay
        self._epoch += 1
        if self._epoch == EPOCHS:
            self._make_room(residents)

    def _make_room(self, residents: int) -> None:
        """Epochs become longer while they do not reach back to the horizon; then the oldest are given up."""
        half = EPOCHS // 2
        if EPOCHS * self._epoch_time < HORIZON_RESIDENTS * residents:
            self._going_on[:, :half] = self._going_on[:, 0::2] + self._going_on[:, 1::2]
            self._epoch_time *= 2
        else:
            self._going_on[:, :half] = self._going_on[:, half:]
            self._first_time += half * self._epoch_time
        self._going_on[:, half:] = 0.0
        self._epoch = half

    def hazards(self) -> Numbers:
        """[class, age] Uses per unit of time."""
        uses, exposure = self._uses.reshape(self._shape), self._exposure.reshape(self._shape)
        by_age = self._by_age(uses.sum((0, 1)), exposure.sum((0, 1)))
        by_group = (uses.sum(1) + GROUP_PRIOR_USES) / (
            exposure.sum(1) + GROUP_PRIOR_USES / (self._group_priors * by_age)
        )
        expected = (exposure * by_group[:, None]).sum((0, 2))
        of_kind = (uses.sum((0, 2)) + GROUP_PRIOR_USES) / (expected + GROUP_PRIOR_USES)
        rough = by_group[:, None] * of_kind[:, None]
        found: Numbers = (uses + CLASS_PRIOR_USES) / (exposure + CLASS_PRIOR_USES / rough)
        return found.reshape(-1, AGES)

    def _by_age(self, uses: Numbers, exposure: Numbers) -> Numbers:
        before = max(float(uses.sum()), 1.0) / max(float(exposure.sum()), 1.0)
        found = np.empty(AGES)
        for age in range(AGES):
            before = found[age] = (uses[age] + 1) / (exposure[age] + 1 / (FALL * before))
        return found

    def gittins(self) -> Numbers:
        """[class, age] The most uses per unit of time that holding a life from that age on can earn."""
        hazards = self.hazards()
        stays = np.exp(-hazards * self._spans)  # through a whole age
        uses, times = 1 - stays, (1 - stays) / hazards  # expected of a life that enters an age
        best = np.zeros_like(hazards)
        for age in range(AGES):
            reaches = np.ones((len(hazards), AGES - age))
            np.cumprod(stays[:, age:-1], axis=1, out=reaches[:, 1:])
            earned = np.cumsum(reaches * uses[:, age:], axis=1)
            spent = np.cumsum(reaches * times[:, age:], axis=1)
            best[:, age] = (earned / spent).max(axis=1)
        return best

    def rank(self, index: Numbers, classes: NDArray[np.integer[Any]], times: Indices) -> Numbers:
        """`index`, as `gittins` made it, of lives that are `times` old; straight between the beginnings of two ages."""
        ages = self.ages(times)
        younger, older = index[classes, ages], index[classes, np.minimum(ages + 1, AGES - 1)]
        found: Numbers = younger + (older - younger) * ((times - self._bounds[ages]) / self._spans[ages])
        return found
