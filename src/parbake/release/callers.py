"""What a new version changes for the callers of the one that it replaces, and which of it would break them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from parbake.contract.model import Contract, TensorSpec


class Change(Struct, frozen=True):
    """One difference between two contracts, as a caller sees it. ``where`` is ``input x`` or ``output y``, unit."""

    where: str
    before: str
    after: str
    breaking: bool
    why: str


def changes(old: Contract, new: Contract) -> tuple[Change, ...]:
    """What ``new`` changes for the callers of ``old``; what breaks them first.

    An input may become wider (a free axis, gaps allowed), an output narrower: whoever asked before still asks
    rightly, and still understands the answer.
    """
    found = [*_inputs(old.inputs, new.inputs), *_outputs(old.outputs, new.outputs), *_others(old, new)]
    return tuple(sorted(found, key=lambda change: not change.breaking))


def breaking(found: Sequence[Change]) -> tuple[Change, ...]:
    """Those of them that break callers."""
    return tuple(change for change in found if change.breaking)


def _inputs(old: Sequence[TensorSpec], new: Sequence[TensorSpec]) -> list[Change]:
    found: list[Change] = []
    for where, was, now in _pairs("input", old, new):
        if now is None:
            found.append(Change(where, words_of(was), "-", True, "callers send it, and would be refused"))
            continue
        found += _both(where, was, now)
        if was.shape != now.shape:
            wide = _covers(now.shape, was.shape)
            why = "takes all that it took" if wide else "what callers send has another shape"
            found.append(Change(f"{where}, shape", _shape(was), _shape(now), not wide, why))
        if was.allow_nan != now.allow_nan:
            why = "gaps are taken now" if now.allow_nan else "callers who send gaps would be refused"
            found.append(
                Change(f"{where}, gaps", _yes(was.allow_nan), _yes(now.allow_nan), was.allow_nan, why)
            )
    why = "it is required, and callers do not send it"
    found += [Change(f"input {now.name}", "-", words_of(now), True, why) for now in _added(old, new)]
    return found


def _outputs(old: Sequence[TensorSpec], new: Sequence[TensorSpec]) -> list[Change]:
    found: list[Change] = []
    for where, was, now in _pairs("output", old, new):
        if now is None:
            found.append(Change(where, words_of(was), "-", True, "callers read it"))
            continue
        found += _both(where, was, now)
        if was.shape != now.shape:
            narrow = _covers(was.shape, now.shape)
            why = "one of the shapes that it had" if narrow else "what callers read has another shape"
            found.append(Change(f"{where}, shape", _shape(was), _shape(now), not narrow, why))
        if was.labels != now.labels:
            gone = bool(was.labels)
            why = "positions stand for something else" if gone else "positions are named now"
            found.append(Change(f"{where}, labels", _list(was.labels), _list(now.labels), gone, why))
    why = "callers need not read it"
    found += [Change(f"output {now.name}", "-", words_of(now), False, why) for now in _added(old, new)]
    return found


def _pairs(
    what: str, old: Sequence[TensorSpec], new: Sequence[TensorSpec]
) -> Iterator[tuple[str, TensorSpec, TensorSpec | None]]:
    """Each tensor that was there, with what it is called in a change and what it has become."""
    after = {spec.name: spec for spec in new}
    for was in old:
        yield f"{what} {was.name}", was, after.get(was.name)


def _added(old: Sequence[TensorSpec], new: Sequence[TensorSpec]) -> list[TensorSpec]:
    known = {spec.name for spec in old}
    return [spec for spec in new if spec.name not in known]


def _both(where: str, was: TensorSpec, now: TensorSpec) -> list[Change]:
    """What is said of inputs and outputs alike."""
    found: list[Change] = []
    if was.datatype != now.datatype:
        found.append(Change(f"{where}, datatype", was.datatype, now.datatype, True, "another datatype"))
    if was.unit != now.unit:
        # A unit that was never said, or is no longer, has not changed for all that is known.
        other = bool(was.unit and now.unit)
        why = "the same number means something else" if other else "only what is said of it differs"
        found.append(Change(f"{where}, unit", was.unit or "-", now.unit or "-", other, why))
    if was.columns != now.columns:
        gone = bool(was.columns)
        why = "columns stand elsewhere, or have other names" if gone else "columns have names now"
        found.append(Change(f"{where}, columns", _list(was.columns), _list(now.columns), gone, why))
    return found


def _others(old: Contract, new: Contract) -> list[Change]:
    found: list[Change] = []
    if old.key.columns != new.key.columns:
        why = "answers are looked up, kept apart and routed by it"
        found.append(Change("key", _key(old), _key(new), True, why))
    if old.key.rounding != new.key.rounding:
        before, after = (_list(tuple(f"{k} {v}" for k, v in c.key.rounding.items())) for c in (old, new))
        found.append(Change("rounding", before, after, False, "the same rows are still taken"))
    if old.batch.max_rows != new.batch.max_rows:
        fewer = new.batch.max_rows < old.batch.max_rows
        why = "larger requests would be refused" if fewer else "larger requests are taken"
        found.append(Change("rows a request", str(old.batch.max_rows), str(new.batch.max_rows), fewer, why))
    if old.default != new.default:
        gone = new.default is None
        why = (
            "unknown keys were answered, and would not be found"
            if gone
            else "unknown keys are answered otherwise"
        )
        before, after = ("-" if c.default is None else str(c.default) for c in (old, new))
        found.append(Change("default", before, after, gone, why))
    return found


def _covers(wide: Sequence[int], narrow: Sequence[int]) -> bool:
    """Whether every tensor of shape ``narrow`` has shape ``wide`` too."""
    return len(wide) == len(narrow) and all(a in (-1, b) for a, b in zip(wide, narrow, strict=True))


def words_of(spec: TensorSpec) -> str:
    """Datatype, shape and unit of a tensor: ``FP32 2 m``."""
    return f"{spec.datatype} {_shape(spec)}" + (f" {spec.unit}" if spec.unit else "")


def _shape(spec: TensorSpec) -> str:
    return "x".join("any" if size == -1 else str(size) for size in spec.shape) or "scalar"


def _key(contract: Contract) -> str:
    return ", ".join(contract.key.columns) or "the row"


def _list(words: Sequence[str]) -> str:
    return ", ".join(words) or "-"


def _yes(value: bool) -> str:
    return "taken" if value else "refused"
