"""What `parbake jobs` shows to a person, and what it asks of a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from parbake.app.jobs import DeadJob, DeadRemoved, JobRemoved, JobsReport, JobsRetried, JobTally
from parbake.cli.exits import Exit
from parbake.cli.jobs import show
from parbake.cli.main import main
from parbake.errors import ServerNotFound

REPORT = JobsReport(
    (
        JobTally("eta", "dead", 3, 7300.0),
        JobTally("eta", "queued", 1200, 65.0),
        JobTally("eta", "running", 4, 130.0),
        JobTally("price", "done", 7, 500.0),
        JobTally("price", "failed", 1, 400.0),
    ),
    (
        DeadJob("new", "eta", "", "shop", 5, 1000.0, 30.0, "attempt 5 of 5 failed: 503\x1b[2J runner_down", True),
        DeadJob("old", "eta", "2", "", 0, 900.0, 7200.0, "not answered within 60 s", False),
    ),
    1_250_000,
)  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_each_deployment_has_a_line_and_so_has_each_job_that_was_given_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(REPORT)
    lines = [cells(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["deployment", "queued", "running", "done", "failed", "cancelled", "dead", "waiting since"],
        ["eta", "1,200", "4", "0", "0", "0", "3", "2 minutes ago"],
        ["price", "0", "0", "7", "1", "0", "0", "-"],
        ["1.2 MB on disk"],
        [],
        ["job", "deployment", "asked by", "attempts", "given up", "why"],
        ["new", "eta", "shop", "5", "just now", "attempt 5 of 5 failed: 503?[2J runner_down"],
        ["old", "eta", "-", "0", "2 hours ago", "not answered within 60 s (its request is not there any"],
        ["more)"],
        ["and 1 that were given up before"],
    ]


def test_where_there_are_none_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show(JobsReport())
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "there are no jobs\n")


class Asked(BaseHTTPRequestHandler):
    """Stands where the admin API is, and notes what it is asked."""

    calls: list[tuple[str, str, object, str]]

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answer what the command asks."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked = msgspec.json.decode(body) if body else None
        self.calls.append((self.command, self.path, asked, self.headers["authorization"]))
        job_id = self.path.rpartition("/")[2]
        if self.path == "/admin/jobs":
            self.reply(REPORT)
        elif self.path == "/admin/jobs/retry" and asked is not None:
            if asked.get("id") == "none":
                self.reply({"error": "no job 'none'", "code": "job_not_found"}, 404)
            elif "id" in asked:
                self.reply(JobsRetried((asked["id"],)))
            elif asked.get("deployment") == "slow":
                self.reply(JobsRetried(("a",), 7, "the disk is full"))
            else:
                self.reply(
                    JobsRetried(()) if asked.get("deployment") == "prize" else JobsRetried(("a",), 1200)
                )
        elif self.path == "/admin/jobs/remove" and asked is not None:
            self.reply(DeadRemoved(0) if asked.get("deployment") == "prize" else DeadRemoved(2, more=True))
        elif job_id == "none":
            self.reply({"error": "no job 'none'", "code": "job_not_found"}, 404)
        else:
            self.reply(JobRemoved(job_id, "eta", "cancelled" if job_id in "ac" else "dead", job_id != "a"))

    def reply(self, content: object, status: int = 200) -> None:
        payload = msgspec.json.encode(content)
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name that it has
        """Say nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("PORT", "ADMIN_URL", "ADMIN_TOKEN"):
        monkeypatch.delenv(f"PARBAKE_{name}", raising=False)
    Asked.calls = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def retry(body: dict[str, object]) -> tuple[str, str, object, str]:
    return "POST", "/admin/jobs/retry", body, "Bearer t"


def all_dead(deployment: str = "", what: str = "retry") -> tuple[str, str, object, str]:
    body = {"all_dead": True, "deployment": deployment} if deployment else {"all_dead": True}
    return "POST", f"/admin/jobs/{what}", body, "Bearer t"


def remove(job_id: str) -> tuple[str, str, object, str]:
    return "DELETE", f"/admin/jobs/{job_id}", None, "Bearer t"


@pytest.mark.parametrize(
    ("words", "calls", "said"),
    [
        ("retry a b", [retry({"id": "a"}), retry({"id": "b"})], "a is to be begun again\nb is to be begun again"),
        ("retry --all-dead", [all_dead()], "1 job is to be begun again\n1,200 jobs are left dead"),
        ("retry --all-dead --deployment eta", [all_dead("eta")], "1 job is to be begun again"),
        ("remove a b", [remove("a"), remove("b")], "a is cancelled\nb (dead) is removed"),
        ("remove c", [remove("c")], "c (cancelled) is removed"),
        ("remove --all-dead", [all_dead("", "remove")], "2 jobs are removed\nthere are more: the same command"),
        ("remove --all-dead --deployment eta", [all_dead("eta", "remove")], "2 jobs are removed"),
        ("remove a/../b", [remove("a%2F..%2Fb")], "is removed"),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_server(
    words: str, calls: list[Any], said: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", *words.split(), "--admin-url", url, "--token", "t"]) == Exit.DONE
    assert Asked.calls == calls
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""


def test_which_server_is_meant_may_be_said_before_and_behind(url: str) -> None:
    words = ["--admin-url", "http://127.0.0.1:9", "--token", "t", "remove", "a"]
    assert main(["jobs", *words, "--admin-url", url]) == Exit.DONE
    assert Asked.calls == [remove("a")]


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--port 9000 remove a", (9000, "", "e")),
        ("remove a --port 9000", (9000, "", "e")),
        ("--port 9000 remove a --port 9001", (9001, "", "e")),
        ("--port 9000", (9000, "", "e")),
        ("--token t remove a", (8000, NOWHERE, "t")),
        ("--token t remove a --token u", (8000, NOWHERE, "u")),
        ("--admin-url {url} retry a", (8000, "{url}", "e")),
        ("--admin-url {url} retry a --port 9000", (9000, "", "e")),
        ("--port 9000 retry a --admin-url {url}", (9000, "{url}", "e")),
        ("remove a", (8000, NOWHERE, "e")),
    ],
)
def test_a_flag_goes_before_the_environment_wherever_it_stands(
    words: str, said: tuple[int, str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, str]] = []

    def call(*_: object, port: int, admin_url: str, token: str) -> bytes:
        asked.append((port, admin_url, token))
        raise ServerNotFound("not asked")

    monkeypatch.setattr("parbake.transports.client._call", call)
    for name, value in (("PORT", "8000"), ("ADMIN_URL", NOWHERE), ("ADMIN_TOKEN", "e")):
        monkeypatch.setenv(f"PARBAKE_{name}", value)
    main(["jobs", *words.format(url=url).split()])
    assert asked == [(said[0], said[1].format(url=url), said[2])]


@pytest.mark.parametrize("what", ["retry", "remove"])
@pytest.mark.parametrize(
    "words",
    [
        "",
        "a --all-dead",
        "a --deployment eta",
        "--all-dead --deployment=",
        "--deployment=",
        "a --deployment=",
    ],
)
def test_which_jobs_are_meant_must_be_said(what: str, words: str, url: str) -> None:
    assert main(["jobs", what, *words.split(), "--admin-url", url]) == Exit.USAGE
    assert Asked.calls == []


@pytest.mark.parametrize(("what", "part"), [("retry", " that can be begun again"), ("remove", "")])
def test_a_deployment_that_has_no_dead_jobs_is_named(
    what: str, part: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["jobs", what, "--all-dead", "--deployment", "prize", "--admin-url", url]
    assert main(words) == Exit.NOT_FOUND
    assert capsys.readouterr().err.splitlines() == [
        f"error: 'prize' has no dead job{part}",
        "hint: parbake jobs shows which deployments have any",
    ]
    assert main([*words, "--json"]) == Exit.NOT_FOUND
    assert "[]" in (told := capsys.readouterr().out) or '"removed": 0' in told


def test_what_kept_the_rest_from_being_begun_again_is_said(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["jobs", "retry", "--all-dead", "--deployment", "slow", "--admin-url", url]
    assert main(words) != Exit.DONE
    assert capsys.readouterr().err.splitlines() == [
        "1 job is to be begun again",
        "error: 7 jobs are left dead: the disk is full",
        "hint: the same command takes more of them in",
    ]


def test_what_the_server_refuses_is_said_with_what_was_done_before(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", "remove", "a", "none", "b", "--admin-url", url]) == Exit.NOT_FOUND
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "a is cancelled"
    assert "no job 'none'" in told[1]
    assert len(Asked.calls) == 2
    for words in ("remove a none b", "retry a none b"):
        assert main(["jobs", *words.split(), "--admin-url", url, "--json"]) == Exit.NOT_FOUND
        assert '"a"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("", '"oldest_s": 7300.0'),
        ("retry a", '"left": 0'),
        ("retry --all-dead", '"left": 1200'),
        ("remove b", '"state": "dead"'),
        ("remove --all-dead", '"removed": 2'),
    ],
)
def test_all_of_it_is_there_for_scripts(
    words: str, part: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["jobs", *words.split(), "--json"], ["jobs", "--json", *words.split()]):
        assert main([*command, "--admin-url", url]) == Exit.DONE
        told = capsys.readouterr()
        assert part in told.out
        assert told.err == ""
