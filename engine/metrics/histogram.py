"""Counts of observations per bucket, filled with whole arrays: a step with 1024 rows costs a few microseconds.

prometheus_client's own Histogram walks its buckets under a lock for every single observation; here a step's values are
sorted into buckets in one numpy call. Filled by one thread (the front end's event loop), read by the scrape in the same
thread, so there is no lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """A histogram with fixed upper bounds (ascending); values above the last bound fall into +Inf."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.text = text
        self._bounds = np.asarray(bounds, np.float64)  # [B]
        self._counts = np.zeros(len(bounds) + 1, np.int64)  # [B + 1], last = +Inf
        self._sum = 0.0

    def observe(self, value: float | None) -> None:
        """One value; None is not counted."""
        if value is not None:
            self._counts[np.searchsorted(self._bounds, value)] += 1
            self._sum += value

    def observe_all(self, values: Sequence[float]) -> None:
        if not values:
            return
        array = np.asarray(values, np.float64)
        # side "left": a value equal to a bound belongs to that bound's bucket (le = less or equal)
        buckets = np.searchsorted(self._bounds, array)
        self._counts += np.bincount(buckets, minlength=len(self._counts))
        self._sum += float(array.sum())

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self.name, self.text, labels=list(labels))
        self.add_to(family, list(labels.values()))
        return family

    def add_to(self, family: HistogramMetricFamily, values: list[str]) -> None:
        """One labelled series with cumulative bucket counts, as the exposition format wants them."""
        names = [*(format(b, "g") if b >= 1 else repr(float(b)) for b in self._bounds), "+Inf"]
        buckets = [(name, float(count)) for name, count in zip(names, np.cumsum(self._counts), strict=True)]
        family.add_metric(values, buckets=buckets, sum_value=self._sum)


def decades(maximum: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, ... up to `maximum`: the buckets of vLLM's token-count histograms."""
    bounds: list[float] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > maximum:
                return bounds or [float(maximum)]
            bounds.append(float(mantissa * scale))
        scale *= 10
