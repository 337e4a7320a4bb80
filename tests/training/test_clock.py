import csv
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.clock import WARM_UP, learning_rate, train

PEAK = 3e-4


@given(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_the_learning_rate_rises_then_holds_then_falls(progress):
    earlier, later = progress
    first, second = (learning_rate(at, PEAK) for at in progress)
    assert 0 <= first <= PEAK
    if later <= WARM_UP:
        assert first <= second
    elif earlier >= WARM_UP and later <= 0.5:
        assert first == second == PEAK
    elif earlier >= 0.5:
        assert first >= second


def test_the_learning_rate_is_zero_at_both_ends_and_half_in_the_middle_of_its_fall():
    assert learning_rate(0, PEAK) == learning_rate(1, PEAK) == learning_rate(1.2, PEAK) == 0
    assert learning_rate(0.75, PEAK) == pytest.approx(PEAK / 2)


class Run:
    """A stretch of `seconds`, each call of which takes ten; the metrics of one call may be `bad`."""

    def __init__(self, monkeypatch, folder, seconds, bad=None):
        self.now, self.rates, self.keys, self.bad = 1000.0, [], [], bad
        self.log = folder / "logs" / "run.csv"
        monkeypatch.setattr("training.clock.time", SimpleNamespace(monotonic=lambda: self.now))
        self.result = lambda: train(self.update, 0, self.now + seconds, PEAK, 0, self.log)

    def update(self, state, rate, key):
        self.now += 10
        self.rates.append(float(rate))
        self.keys.append(jax.random.key_data(key).tolist())
        return state + 1, {"loss": np.float32(np.nan if state == self.bad else 1 / (1 + state))}


def test_training_stops_at_its_moment_and_logs_a_row_a_call(monkeypatch, tmp_path):
    run = Run(monkeypatch, tmp_path, 400)
    assert run.result() == (40, 40)
    with run.log.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["call"]) for row in rows] == list(range(40))
    assert [float(row["loss"]) for row in rows] == pytest.approx([1 / (1 + call) for call in range(40)], rel=1e-5)
    assert [float(row["rate"]) for row in rows] == pytest.approx(run.rates, rel=1e-5)
    assert len(set(map(tuple, run.keys))) == 40


def test_the_two_calls_that_compile_have_no_learning_rate_and_the_stretch_begins_after_them(monkeypatch, tmp_path):
    run = Run(monkeypatch, tmp_path, 400)
    run.result()
    assert run.rates[:2] == [0, 0]
    assert run.rates[2:] == pytest.approx([learning_rate(10 * call / 380, PEAK) for call in range(38)])
    assert max(run.rates) == pytest.approx(PEAK) and 0 < run.rates[-1] < 0.06 * PEAK


@pytest.mark.parametrize("bad", [0, 7, 9], ids=["first", "middle", "last"])
def test_a_metric_that_is_not_a_number_stops_training(monkeypatch, tmp_path, bad):
    run = Run(monkeypatch, tmp_path, 100, bad)
    with pytest.raises(FloatingPointError, match=f"call {bad} gave .*nan.*; lower the learning rate"):
        run.result()
    assert len(run.rates) <= bad + 2


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_time_too_short_to_learn_anything_is_said(monkeypatch, tmp_path, calls):
    run = Run(monkeypatch, tmp_path, 10 * calls)
    with pytest.raises(ValueError, match=f"over after {calls} calls, before anything was learned; allow more seconds"):
        run.result()
