"""Which version of a deployment answers a request: rules first, then weights, sticky by key.

Weights go by weighted rendezvous hashing (D. G. Thaler and C. V. Ravishankar, "Using name-based mappings to increase
hit rates", IEEE/ACM Transactions on Networking 6(1), 1998; with weights: J. Mosko, "Weighted Distributed Hash
Tables", 2005). Each version draws for each key an exponential number with its weight as the rate, by hashing, and the
smallest draw has the key. So a version has the share that its weight has of all weights, and keys move only to a
version whose weight was raised, or away from one whose weight was lowered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Struct

from parbake.contract.datatypes import NUMPY
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.tensors import Shape, row_slices
from parbake.errors import InvalidInput, SettingsError
from parbake.names import Name
from parbake.runtime.observation import Bins

Kind = Literal["canary", "ab", "bandit"]
Why = Literal["weights", "rule", "kill", "absent"]
Loss = Literal["", "squared", "absolute", "zero_one", "reward"]
"""``squared`` and ``absolute`` difference; ``zero_one``: 1 where they differ; ``reward``: 1 less the label, whatever
was predicted: the label says what it was good for, from 0 to 1."""

_SUM_TOLERANCE: Final = 1e-6
_MOST_ARMS: Final = 16
_MOST_RULES: Final = 64
_HASH_BYTES: Final = 8
_HASHES: Final = 1 << (8 * _HASH_BYTES)


class Arm(Struct, frozen=True, forbid_unknown_fields=True):
    """A version and the share of the keys that it gets."""

    version: Name
    weight: float


class Rule(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Requests for which all of this holds go to ``version``, whatever the weights say.

    ``headers``, ``parameters`` and ``columns`` give for a name the values that are meant; no values at all mean that
    it only has to be there.
    """

    version: Name
    headers: dict[str, tuple[str, ...]] = {}
    """HTTP headers, or metadata of gRPC."""
    parameters: dict[str, tuple[str, ...]] = {}
    """Parameters of the request (``$.parameters``), or of the query part of its URL."""
    columns: dict[str, tuple[str, ...]] = {}
    """Inputs, or columns of a matrix, of the first row: an entity, where they are what the key is made of."""
    share: float | None = None
    """Part of the keys, always the same ones."""
    after: float | None = None
    """Unix time from which the rule holds."""
    before: float | None = None
    """Unix time at which it ends."""

    def __post_init__(self) -> None:
        """Refuse what never holds, or always."""
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share of a rule is {self.share:g}, expected more than 0 and at most 1")
        if self.after is not None and self.before is not None and self.after >= self.before:
            raise ValueError("a rule ends before it begins")
        bounded = (self.share, self.after, self.before)
        if not (self.headers or self.parameters or self.columns or any(b is not None for b in bounded)):
            raise ValueError(
                f"a rule for version {self.version} has no condition; give that version all the weight"
            )


class Shadow(Struct, frozen=True, forbid_unknown_fields=True):
    """A version that is asked the same as the one that answers, for comparison only."""

    version: Name
    share: float = 1.0
    """Part of the keys that it gets."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0 < self.share <= 1:
            raise ValueError(
                f"version {self.version} is to shadow a share of {self.share:g}, expected more than 0 and at most 1"
            )


class Watch(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is counted of each version under a route, so that they can be compared."""

    output: str = ""
    """Name of the output whose values are counted; "" for the first."""
    place: int = 0
    """Which of its elements, where it has several."""
    bins: Bins | None = None
    """How its values are counted; by default as the champion's goldens lie."""
    segment: str = ""
    """Input, or column of a matrix, by whose values rows are counted apart."""
    loss: Loss = ""
    """How a prediction is held against its label; "" where none are expected."""
    labels_s: Annotated[float, msgspec.Meta(gt=0)] = 24 * 3600.0
    """How long a label is waited for."""
    step: int = 0
    """Step of a release; where it changes, what is counted begins anew."""


class Route(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the requests of one deployment that name no version are shared out."""

    deployment: Name
    champion: Name
    """The version that answers where another cannot."""
    arms: tuple[Arm, ...]
    rules: tuple[Rule, ...] = ()
    """The first that holds decides."""
    shadows: tuple[Shadow, ...] = ()
    kind: Kind = "canary"
    sticky: str = ""
    """What is kept with one version: "" for the key of the first row, ``header:NAME`` or ``parameter:NAME``."""
    killed: bool = False
    """Whether the champion answers everything, and nothing is shadowed."""
    timeout_ms: float | None = None
    """Time after which the champion is asked in place of another version."""
    rescue: bool = True
    """Whether the champion answers where another version fails."""
    watch: Watch | None = None
    """What is counted of each version; None counts requests only."""
    revision: int = 0
    """Counts the changes of the route; given by the server."""
    since: int = 0
    """Revision at which it began to be watched like this; given by the server."""

    def __post_init__(self) -> None:
        """Refuse weights that do not add up, and versions that are named twice."""
        if not 1 <= len(self.arms) <= _MOST_ARMS:
            raise ValueError(f"a route has 1 to {_MOST_ARMS} versions with a weight, got {len(self.arms)}")
        if len(self.rules) > _MOST_RULES:
            raise ValueError(f"a route has at most {_MOST_RULES} rules, got {len(self.rules)}")
        for versions in ([arm.version for arm in self.arms], [s.version for s in self.shadows]):
            if len(set(versions)) < len(versions):
                raise ValueError(f"a version is named twice: {', '.join(versions)}")
        for arm in self.arms:
            if not (math.isfinite(arm.weight) and arm.weight >= 0):
                raise ValueError(f"weight of version {arm.version} is {arm.weight}, expected 0 or more")
        total = sum(arm.weight for arm in self.arms)
        if abs(total - 1) > _SUM_TOLERANCE:
            raise ValueError(f"weights must add up to 1, got {total:g}")
        if self.sticky and self.sticky.partition(":")[0] not in ("header", "parameter"):
            raise ValueError(f"sticky is {self.sticky!r}, expected header:NAME or parameter:NAME")
        if self.kind == "bandit" and (self.watch is None or self.watch.loss not in ("reward", "zero_one")):
            raise ValueError("a bandit needs labels: watch with loss reward or zero_one")
        if self.timeout_ms is not None and not self.timeout_ms > 0:
            raise ValueError(f"timeout is {self.timeout_ms:g} ms, expected more than 0")

    @property
    def versions(self) -> tuple[str, ...]:
        """All versions that it names, each once."""
        named = (
            (a.version for a in self.arms),
            (r.version for r in self.rules),
            (s.version for s in self.shadows),
        )
        return tuple(dict.fromkeys((self.champion, *(version for part in named for version in part))))


class Hints(Struct, frozen=True):
    """What a request says beside its rows."""

    headers: Mapping[str, str] = {}
    """By name in lower case."""
    parameters: Mapping[str, Any] = {}


NO_HINTS: Final = Hints()


class Row(Struct, frozen=True):
    """The first row of a request: raw bytes and shape of each input, and its key."""

    raws: Sequence[bytes]
    shapes: Sequence[Shape]
    key: bytes


class Chooser:
    """A route made ready for many requests; ``contract`` is the champion's. Raises `SettingsError`.

    ``clock`` gives Unix time.
    """

    def __init__(self, route: Route, contract: Contract, clock: Callable[[], float]) -> None:
        self.route = route
        self._clock = clock
        self._draws = [
            (arm.version, _hash_of(route.deployment, arm.version), arm.weight)
            for arm in route.arms
            if arm.weight > 0
        ]
        self._only = self._draws[0][0] if len(self._draws) == 1 else ""
        self._rules = [] if route.killed else [_Condition(route.deployment, r, contract) for r in route.rules]
        self._shadows = (
            []
            if route.killed
            else [
                (s.version, _hash_of(route.deployment, f"shadow {s.version}"), s.share) for s in route.shadows
            ]
        )
        where, _, self._sticky = route.sticky.partition(":")
        self._by_header = where == "header"
        if self._by_header:
            self._sticky = self._sticky.lower()
        self.needs_hints = bool(self._sticky) or any(rule.needs_hints for rule in self._rules)
        """Whether headers and parameters matter."""
        named = {name.lower() for rule in route.rules for name in rule.headers}
        self.headers = frozenset(
            name.encode("latin-1", "replace")
            for name in named | ({self._sticky} if self._by_header else set())
        )
        """Names of the headers that matter."""

    def choose(self, row: Row, hints: Hints = NO_HINTS) -> tuple[str, Why]:
        """The version that answers, and what decided."""
        if self.route.killed:
            return self.route.champion, "kill"
        for rule in self._rules:
            if rule.holds(row, hints, self._clock):
                return rule.version, "rule"
        if self._only:
            return self._only, "weights"
        key = self.stuck_to(row, hints)
        return min(self._draws, key=lambda arm: _draw(arm[1], key) / arm[2])[0], "weights"

    def stuck_to(self, row: Row, hints: Hints = NO_HINTS) -> bytes:
        """What is kept with one version."""
        if self._sticky:
            found = (hints.headers if self._by_header else hints.parameters).get(self._sticky)
            if found is not None:
                return words(found).encode()
        return row.key

    def shadows(self, row: Row, answered: str) -> list[str]:
        """The versions that get a copy of a request that version ``answered`` answers."""
        return [
            version
            for version, begun, share in self._shadows
            if version != answered and (share >= 1 or _uniform(begun, row.key) <= share)
        ]


class _Condition:
    """A rule, with its values as bytes."""

    def __init__(self, deployment: str, rule: Rule, contract: Contract) -> None:
        self.version = rule.version
        self._rule = rule
        self._headers = {name.lower(): frozenset(values) for name, values in rule.headers.items()}
        self._parameters = {name: frozenset(values) for name, values in rule.parameters.items()}
        self._columns = [Column(contract, name, values) for name, values in rule.columns.items()]
        self._begun = _hash_of(deployment, f"rule {rule.version}")
        self.needs_hints = bool(self._headers or self._parameters)

    def holds(self, row: Row, hints: Hints, clock: Callable[[], float]) -> bool:
        rule = self._rule
        if rule.after is not None or rule.before is not None:
            now = clock()
            if (rule.after is not None and now < rule.after) or (
                rule.before is not None and now >= rule.before
            ):
                return False
        return (
            all(_among(hints.headers.get(name), values) for name, values in self._headers.items())
            and all(_among(hints.parameters.get(name), values) for name, values in self._parameters.items())
            and all(column.matches(row.raws, row.shapes) for column in self._columns)
            and (rule.share is None or _uniform(self._begun, row.key) <= rule.share)
        )


class Column:
    """One column of the inputs, to be read from the raw bytes of a row. Raises `SettingsError` where there is none."""

    def __init__(self, contract: Contract, name: str, values: Sequence[str] = ()) -> None:
        self.name = name
        self.position, self.spec, self._place = _locate(contract, name)
        self._size = NUMPY[self.spec.datatype].itemsize if self.spec.datatype != "BYTES" else 0
        self._values = frozenset(self._packed(value) for value in values)

    def matches(self, raws: Sequence[bytes], shapes: Sequence[Shape]) -> bool:
        """Whether the first row has one of the values, or has the column at all."""
        found = self.first(raws)
        return bool(found) and (not self._values or found in self._values)

    def first(self, raws: Sequence[bytes]) -> bytes:
        """The raw bytes of the first row's value; nothing where the input was left out."""
        return self._in(raws[self.position])

    def _in(self, raw: bytes) -> bytes:
        if self._size:
            return raw[self._place * self._size : (self._place + 1) * self._size]
        at = 0
        for _ in range(self._place):
            at += 4 + int.from_bytes(raw[at : at + 4], "little")
        return raw[at : at + 4 + int.from_bytes(raw[at : at + 4], "little")]

    def each(self, raws: Sequence[bytes], rows: int) -> list[bytes]:
        """The raw bytes of each row's value."""
        raw = raws[self.position]
        if rows == 1 or not raw:
            return [self.first(raws)] * rows
        return [self._in(row) for row in row_slices(raw, self.spec.datatype, rows, self.spec.elements)]

    def text(self, value: bytes) -> str:
        """Raw bytes of a value as a person writes it."""
        if not self._size:
            return value[4:].decode(errors="replace")
        (number,) = np.frombuffer(value, NUMPY[self.spec.datatype]).tolist()
        return words(number)

    def _packed(self, value: str) -> bytes:
        if not self._size:
            data = value.encode()
            return len(data).to_bytes(4, "little") + data
        dtype = NUMPY[self.spec.datatype]
        try:
            number = {"true": 1, "false": 0}[value.lower()] if dtype.kind == "b" else float(value)
            if dtype.kind in "iu":
                number = int(value)
            return np.array([number]).astype(dtype).tobytes()
        except (ValueError, KeyError, OverflowError) as error:
            raise SettingsError(
                f"{value[:40]!r} is no {self.spec.datatype}, which column {self.name!r} has",
                hint="write values as they are in requests",
            ) from error


def bandit_weights(
    rewards: Mapping[str, tuple[float, float]], draws: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Thompson sampling (W. R. Thompson, Biometrika 25, 1933): how probably each version is the best one.

    ``rewards`` has for each version the sum of its rewards and of what was missing to 1 (Bernoulli: successes and
    failures); the priors are uniform.
    """
    rng = np.random.default_rng(seed)
    versions = list(rewards)
    samples = np.stack(
        [rng.beta(1 + max(rewards[v][0], 0), 1 + max(rewards[v][1], 0), draws) for v in versions]
    )
    best = np.bincount(samples.argmax(axis=0), minlength=len(versions)) / draws
    return {version: float(share) for version, share in zip(versions, best, strict=True)}


def words(value: Any) -> str:
    """A value as a person writes it: whole numbers without a point."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def first_row(contract: Contract, raws: Sequence[bytes], rows: int, shapes: Sequence[Shape]) -> list[bytes]:
    """The raw bytes of a request's first row, by input."""
    if rows == 1:
        return list(raws)
    return [
        raw and row_slices(raw, spec.datatype, rows, math.prod(shape))[0]
        for spec, raw, shape in zip(contract.inputs, raws, shapes, strict=True)
    ]


def _hash_of(deployment: str, what: str) -> Any:
    """A hash that has begun with what makes it different from all others."""
    return blake2b(f"{deployment}\0{what}\0".encode(), digest_size=_HASH_BYTES)


def _uniform(begun: Any, key: bytes) -> float:
    """A number above 0 and at most 1, always the same one for a key."""
    row = begun.copy()
    row.update(key)
    return (int.from_bytes(row.digest(), "little") + 1) / _HASHES


def _draw(begun: Any, key: bytes) -> float:
    """An exponential number, always the same one for a key."""
    return -math.log(_uniform(begun, key))


def _among(value: Any, values: frozenset[str]) -> bool:
    return value is not None and (not values or words(value) in values)


def _locate(contract: Contract, name: str) -> tuple[int, TensorSpec, int]:
    """Input, its specification, and the place of a column in its row. Raises `SettingsError`."""
    for position, spec in enumerate(contract.inputs):
        if spec.name == name and spec.fixed and spec.elements == 1:
            return position, spec, 0
        if name in spec.columns:
            return position, spec, spec.columns.index(name)
    names = [n for s in contract.inputs for n in (s.columns or ((s.name,) if s.elements == 1 else ()))]
    raise SettingsError(
        f"model {contract.name!r} has no column {name[:60]!r}",
        hint=f"its columns are {', '.join(names[:12])}",
    )


def check_served(route: Route, contracts: Mapping[str, Contract]) -> None:
    """Raise `InvalidInput` where a route names a version that is not served, or one that takes something else.

    ``contracts`` are those of the deployment's versions.
    """
    for version in route.versions:
        if version not in contracts:
            raise InvalidInput(
                f"{route.deployment!r} has no version {version[:60]!r}",
                hint=f"versions: {', '.join(contracts) or 'none'}",
            )
    champion = contracts[route.champion]
    for version in route.versions:
        for what, ours, theirs in (
            ("inputs", champion.inputs, contracts[version].inputs),
            ("outputs", champion.outputs, contracts[version].outputs),
        ):
            if [_form(spec) for spec in ours] != [_form(spec) for spec in theirs]:
                raise InvalidInput(
                    f"the {what} of version {version} of {route.deployment!r} are not those of version "
                    f"{route.champion}",
                    hint="versions under one route take the same inputs and give the same outputs",
                )
    Chooser(route, champion, lambda: 0.0)
    if route.watch is not None:
        check_watch(champion, route.watch)


def check_watch(contract: Contract, watch: Watch) -> None:
    """Raise `InvalidInput` where there is no such output or column."""
    watched(contract, watch.output)
    if watch.segment:
        Column(contract, watch.segment)


def watched(contract: Contract, name: str) -> tuple[int, TensorSpec]:
    """Position and specification of the output of that name, "" for the first. Raises `InvalidInput`."""
    for position, spec in enumerate(contract.outputs):
        if not name or spec.name == name:
            return position, spec
    names = ", ".join(spec.name for spec in contract.outputs)
    raise InvalidInput(
        f"model {contract.name!r} has no output {name[:60]!r}", hint=f"its outputs are {names}"
    )


def _form(spec: TensorSpec) -> tuple[object, ...]:
    """What callers see of a tensor."""
    return spec.name, spec.datatype, spec.shape, spec.columns, spec.allow_nan
