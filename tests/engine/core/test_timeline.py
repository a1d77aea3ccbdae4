"""The spans of a start: they begin with the process, leave nothing out, and follow a runner's progress."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from engine.core.timeline import Timeline, process_age_s, table


def test_spans_add_up_to_the_age_of_the_process():
    timeline = Timeline()
    timeline.done("process")
    heard = []
    progress = timeline.watch(lambda *event: heard.append(event))
    time.sleep(0.05)
    progress("compile", 1, 2)
    assert list(timeline.seconds) == ["process"]  # a phase ends with its last part
    progress("compile", 2, 2)
    time.sleep(0.02)
    timeline.done("warm_up")
    timeline.done("compile")
    assert list(timeline.seconds) == ["process", "compile", "warm_up"]
    assert timeline.seconds["compile"] >= 0.05 and timeline.seconds["warm_up"] >= 0.02
    assert heard == [("compile", 1, 2), ("compile", 2, 2)]
    assert sum(timeline.seconds.values()) == pytest.approx(process_age_s(), abs=0.1)


def test_age_is_that_of_this_process():
    program = "import time; from engine.core.timeline import process_age_s; time.sleep(0.5); print(process_age_s())"
    begun = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 0.5 <= told <= time.monotonic() - begun + 0.02  # the system counts in ticks of 10 ms


def test_table_names_shares():
    lines = table({"load": 1.0, "warm_up": 3.0}).splitlines()
    assert lines[1].split() == ["warm_up", "3.00", "s", "75.0%"]
    assert lines[2].split() == ["together", "4.00", "s", "100.0%"]
