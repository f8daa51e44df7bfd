"""What an interrupted bake left is used only where it is certain to belong to the same bake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from parbake.batch.model import OnBad, Piece, Tally
from parbake.batch.segments import Segment, sort, write
from parbake.batch.workspace import BakeState, Workspace
from parbake.errors import TableError

STATE = BakeState("sha256:a", "csv", "", "numpy 2")


def _segment(space: Workspace, name: str, *pieces: Piece, skipped: int = 0) -> Segment:
    keys = np.frombuffer(name.encode().ljust(16), np.uint8).reshape(1, 16)
    part, _ = sort(keys, np.array([1]), [b"x"], "f", "row")
    return write(space.segments, name, part, pieces, Tally(1, skipped))


def _names(
    space: Workspace,
    state: BakeState = STATE,
    on_bad: OnBad = "error",
    known: set[tuple[int, bytes]] | None = None,
) -> list[str]:
    found = [segment.path.stem for segment in space.resume(state, on_bad, known)]
    assert sorted(path.stem for path in space.segments.iterdir()) == found
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a table would go; beside it is what a run left that had two segments, one with a skipped row."""
    with Workspace(tmp_path / "t") as space:
        assert _names(space) == []
        assert not space.interrupted
        _segment(space, "a", Piece(0, 10, digest=b"1"), Piece(20, 30, digest=b"3"))
        _segment(space, "b", Piece(10, 20, digest=b"2"), skipped=1)
        assert space.interrupted
    return tmp_path / "t"


def test_the_same_bake_finds_its_segments(out: Path) -> None:
    with Workspace(out) as space:
        assert _names(space, on_bad="skip") == ["a", "b"]
        assert _names(space, on_bad="skip", known={(0, b"1"), (20, b"3"), (10, b"2")}) == ["a", "b"]


@pytest.mark.parametrize(
    "change",
    [
        {"bundle_digest": "b"},
        {"input_format": "jsonl"},
        {"input_identity": "x"},
        {"libraries": ""},
        {"format": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_bake_starts_afresh(out: Path, change: dict[str, object]) -> None:
    with Workspace(out) as space:
        assert _names(space, replace(STATE, **change), "skip") == []
        assert _names(space) == []


def test_segments_with_skipped_rows_are_made_again_where_bad_rows_are_errors(out: Path) -> None:
    with Workspace(out) as space:
        assert _names(space) == ["a"]


def test_segments_whose_content_the_input_no_longer_has_are_made_again(out: Path) -> None:
    with Workspace(out) as space:
        assert _names(space, on_bad="skip", known={(0, b"1"), (20, b"x"), (10, b"2")}) == ["b"]


def test_of_segments_with_the_same_rows_one_is_used(out: Path) -> None:
    # As when a worker wrote on after its bake had been killed, while the next one was running
    with Workspace(out) as space:
        _segment(space, "c", Piece(20, 25))
        _segment(space, "d", Piece(30, 40))
        assert _names(space, on_bad="skip") == ["a", "b", "d"]


def test_a_state_that_cannot_be_read_starts_afresh(out: Path) -> None:
    with Workspace(out) as space:
        (space.folder / "state.json").write_bytes(b"{")
        assert _names(space, on_bad="skip") == []


def test_one_bake_at_a_time_has_the_folder(out: Path) -> None:
    with Workspace(out):
        with pytest.raises(TableError, match="another bake is writing"), Workspace(out):
            pass
        with Workspace(out.with_name("other")):
            pass
    with Workspace(out) as space:
        assert _names(space) == ["a"]


def test_a_folder_removed_by_the_bake_that_had_it_is_claimed_anew(out: Path) -> None:
    with Workspace(out) as space:
        space.remove()
        assert not space.folder.exists()
        with Workspace(out) as next_one:
            assert _names(next_one) == []


def test_a_run_that_fails_before_it_did_anything_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), Workspace(tmp_path / "t"):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_clean_up_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".t.baked-1" / "segments").mkdir(parents=True)
    with Workspace(tmp_path / "t") as space:
        space.remove()
    assert list(tmp_path.iterdir()) == []
