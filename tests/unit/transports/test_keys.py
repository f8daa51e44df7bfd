"""Requests are held against the keys in force, and fronts count a client's requests together."""

from __future__ import annotations

from pathlib import Path

import pytest

from parbake.app.keys import ApiKey, hash_of
from parbake.errors import NotAllowed, RateLimited, Unauthenticated
from parbake.transports import keys as module
from parbake.transports.keys import EVERYBODY, Gate, Holder, check_deployment, check_everything


def rates(folder: Path, count: int) -> Path:
    path = folder / "rates"
    path.write_bytes(bytes(8 * count))
    return path


def gate(folder: Path, *keys: ApiKey) -> Gate:
    found = Gate()
    found.use(keys, rates(folder, len(keys)))
    return found


ONE = ApiKey("one", hash_of("secret-one"), ("eta",))
TWO = ApiKey("two", hash_of("secret-two"))


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer secret-one"},
        {b"authorization": b"bearer   secret-one "},
        {b"x-api-key": b"secret-one"},
        {b"authorization": b"Basic dTpw", b"x-api-key": b"secret-one"},
        {b"authorization": b"Bearer secret-one", b"x-api-key": b"secret-two"},
    ],
)
def test_a_key_is_found_where_clients_put_it(tmp_path: Path, headers: dict[bytes, bytes]) -> None:
    assert gate(tmp_path, ONE, TWO).holder(headers).name == "one"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"secret-one"},
        {b"authorization": b"Basic secret-one"},
        {b"authorization": b"Bearer secret-onE"},
        {b"authorization": b"Bearer secret-one secret-one"},
        {b"authorization": b"Bearer \xff\xfe"},
        {b"authorization": b"Bearer " + ONE.sha256.encode()},
        {b"x-api-key": b""},
        {b"x-api-key": b"secret-three"},
    ],
)
def test_nobody_is_let_in_without_a_known_key(tmp_path: Path, headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Unauthenticated):
        gate(tmp_path, ONE, TWO).holder(headers)
    with pytest.raises(Unauthenticated):
        gate(tmp_path).holder(headers)


def test_a_key_is_good_for_what_it_names_and_for_no_more(tmp_path: Path) -> None:
    found = gate(tmp_path, ONE, TWO)
    one, two = found.holder_of("secret-one"), found.holder_of("secret-two")
    check_deployment(one, "eta")
    for name in ("ETA", "eta ", "", "other"):
        with pytest.raises(NotAllowed):
            check_deployment(one, name)
        check_deployment(two, name)
    check_everything(two)
    with pytest.raises(NotAllowed):
        check_everything(one)


def test_a_key_that_is_read_again_is_looked_up_anew_and_stays_counted(tmp_path: Path) -> None:
    found = gate(tmp_path, ONE, TWO)
    before = found.holder_of("secret-one")
    before.take()
    found.use([ONE], rates(tmp_path, 1))
    assert not before.valid
    assert EVERYBODY.valid
    now = found.holder_of("secret-one")
    now.take()
    assert found.counts() == {"one": 2, "two": 0}
    with pytest.raises(Unauthenticated):
        found.holder_of("secret-two")


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "perf_counter", found)
    return found


def taken(holder: Holder, most: int = 1000) -> int:
    """How many requests are let in at once."""
    for count in range(most):
        try:
            holder.take()
        except RateLimited:
            return count
    return most


@pytest.mark.parametrize("rate", [1.0, 5.0, 100.0])
def test_a_second_of_the_rate_may_come_at_once_and_then_the_rate(clock: Clock, rate: float) -> None:
    holder = Holder("team", rate_per_s=rate)
    assert taken(holder) == rate
    for _ in range(5):
        clock.now += 1 / rate
        assert taken(holder) == 1
    clock.now += 0.5
    assert taken(holder) == rate // 2
    # What was not asked for in an hour is not saved up.
    clock.now += 3600
    assert taken(holder) == rate


def test_less_than_one_a_second_is_kept_too_and_the_caller_is_told_when(clock: Clock) -> None:
    holder = Holder("slow", rate_per_s=0.1)
    holder.take()
    clock.now += 4
    with pytest.raises(RateLimited, match=r"client 'slow' asks more than 0\.1 times a second") as caught:
        holder.take()
    assert caught.value.retry_after_s == pytest.approx(6, rel=0.01)
    clock.now += caught.value.retry_after_s
    holder.take()
    assert holder.requests == 2


def test_fronts_count_a_client_together_and_clients_apart(tmp_path: Path, clock: Clock) -> None:
    keys = [
        ApiKey("one", hash_of("a"), rate_per_s=10),
        ApiKey("two", hash_of("b"), rate_per_s=10),
        ApiKey("free", hash_of("c")),
    ]
    shared = rates(tmp_path, 3)
    fronts = [Gate(), Gate()]
    for front in fronts:
        front.use(keys, shared)
    asked = 0
    for at in range(40):
        try:
            fronts[at % 2].holder_of("a").take()
            asked += 1
        except RateLimited:
            continue
    assert asked == 10
    assert sum(front.counts()["one"] for front in fronts) == 10
    assert taken(fronts[1].holder_of("b")) == 10
    assert taken(fronts[0].holder_of("c"), 500) == 500


def test_without_the_shared_file_each_front_counts_for_itself(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Gate()
    found.use([ApiKey("one", hash_of("a"), rate_per_s=10)], tmp_path / "gone")
    assert taken(found.holder_of("a")) == 10
    assert "keys.rates_not_shared" in capsys.readouterr().err
