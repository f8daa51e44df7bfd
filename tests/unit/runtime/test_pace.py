"""The pace of a machine over spans of time, from looks that are made up."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.runtime.pace import Pace, _paces, _sound

Looks = npt.NDArray[np.float64]


def looks(*took: float) -> Looks:
    """One each 10 ms from 0 on."""
    return np.column_stack([np.arange(len(took)) / 100, took])


def test_half_of_the_time_half_as_quick_is_three_quarters_of_the_pace() -> None:
    made = looks(*[1e-4] * 50, *[2e-4] * 50)

    assert _paces(made, [(0.0, 0.5), (0.5, 1.0), (0.0, 1.0)]).tolist() == pytest.approx(
        [10_000, 5_000, 7_500]
    )


def test_a_span_without_looks_has_the_pace_of_those_around_it() -> None:
    made = looks(*[1e-4] * 50, *[2e-4] * 50)

    found = _paces(made, [(0.2001, 0.2002), (0.8001, 0.8002), (-1.0, -0.5), (5.0, 6.0)])

    assert found.tolist() == pytest.approx([10_000, 5_000, 10_000, 5_000])


def test_a_look_that_took_next_to_no_time_is_left_out() -> None:
    made = looks(*[1e-4] * 10, 0.0, *[1e-4] * 10, 1e-7, *[1e-4] * 10)

    assert _paces(_sound(made), [(0.0, 1.0)]).tolist() == pytest.approx([10_000])


@pytest.mark.parametrize("quick", [3, 10, 60, 90])
def test_a_machine_that_is_more_than_twice_as_quick_for_a_while_is_believed(quick: int) -> None:
    made = looks(*[23e-5] * 100, *[94e-6] * quick)

    assert len(_sound(made)) == 100 + quick


def test_a_clock_that_tells_nothing_gives_no_looks() -> None:
    assert len(_sound(looks(*[0.0] * 50))) == 0


@pytest.mark.parametrize("start", [0.0, 3.0, 42.0, 99.7, 200.0])
def test_what_is_asked_of_a_long_time_is_told_from_the_looks_around_it(tmp_path: Path, start: float) -> None:
    random = np.random.default_rng(7)
    made = looks(*np.exp(random.normal(-9, 0.3, 10_000)))
    (tmp_path / "looks").write_bytes(made.tobytes())
    pace = Pace()
    pace._paths, pace.seen = [tmp_path / "looks"], True

    spans = [(start, start + 0.001), (start + 0.2, start + 7.0)]

    assert pace.of(spans).tolist() == pytest.approx(_paces(_sound(made), spans).tolist())


def test_a_clock_with_coarse_steps_tells_a_pace_by_all_looks_that_there_are(tmp_path: Path) -> None:
    # Of 400 looks every 20th saw the clock go on: in the last moments there are next to none.
    made = looks(*(1e-2 if at % 20 == 10 else 0.0 for at in range(400)))
    (tmp_path / "looks").write_bytes(made.tobytes())
    pace = Pace()
    pace._paths, pace.seen = [tmp_path / "looks"], True

    found = pace.of([(float(made[-2, 0]), float(made[-1, 0]))]).tolist()

    assert found == pytest.approx([100])


@given(
    took=st.lists(st.floats(1e-5, 1e-2), min_size=10, max_size=40),
    start=st.floats(-1, 2),
    length=st.floats(0, 1),
)
def test_a_pace_is_between_the_slowest_and_the_quickest_look(
    took: list[float], start: float, length: float
) -> None:
    (found,) = _paces(looks(*took), [(start, start + length)]).tolist()

    assert 1 / max(took) * (1 - 1e-9) <= found <= 1 / min(took) * (1 + 1e-9)
