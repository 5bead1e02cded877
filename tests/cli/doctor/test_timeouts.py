"""``llmproxy doctor timeouts``: what it says of a ledger, and with which code it ends."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from llmproxy.cli.doctor.fingerprint import Fingerprint
from llmproxy.cli.doctor.timeouts import advice
from llmproxy.cli.main import main
from llmproxy.record.ledger import Ledger
from llmproxy.record.trace import Trace
from tests.support.records import trace


def run(*arguments: str) -> int:
    """Run the command."""
    return main(["doctor", "timeouts", *arguments])


def fill(path: Path, *traces: Trace) -> str:
    """Make a ledger with these traces; return its name."""
    with closing(Ledger(str(path), keep_s=None, wall=lambda: 0.0)) as ledger:
        ledger.put(list(traces))
    return str(path)


def left(number: int, after: float) -> Trace:
    """Return the record of a request whose client left so long after the last chunk."""
    return trace(
        number,
        route="openai",
        provider="p",
        end_reason="client_gone",
        head_s=1.0,
        last_chunk_s=float(number),
        duration_s=number + after,
    )


def test_a_limit_is_named_with_what_to_look_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence for each, with the share of the cuts that it is made of."""
    cuts = [left(n, 60.0 + n / 100) for n in range(10)] + [left(20, 3.0), left(21, 17.0)]
    assert run(fill(tmp_path / "ledger", *cuts)) == 0
    assert capsys.readouterr().out == (
        "route openai, provider p: 10 of 12 cuts came 60.0 s after the last byte, from the "
        "client's side: look for a limit of 60 s on silence between client and proxy, or in the "
        "client; `heartbeat` on the route fills the silence of a stream (nginx's "
        "`proxy_read_timeout` is 60 s; an AWS load balancer's idle timeout is 60 s; Varnish's "
        "`between_bytes_timeout` is 60 s).\n"
    )


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same for a program."""
    assert run("--json", fill(tmp_path / "ledger", *[left(n, 45.0) for n in range(6)])) == 0
    report = json.loads(capsys.readouterr().out)
    (found,) = report.pop("fingerprints")
    assert report == {"cuts": 6}
    assert found.pop("advice").startswith("look for a limit of 45 s on silence between client")
    assert found == {
        "route": "openai",
        "provider": "p",
        "side": "client",
        "clock": "silence",
        "seconds": 45.0,
        "agreeing": 6,
        "of": 6,
    }


def test_nothing_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is made up."""
    assert run(fill(tmp_path / "ledger", left(1, 60.0))) == 0
    assert capsys.readouterr().out == "1 cut, and no limit shows in them.\n"


def test_a_ledger_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """An error that names it, and code 1."""
    assert run("/nowhere/ledger") == 1
    assert "/nowhere/ledger" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "clock", "known"),
    [
        (15.0, "age", "Envoy"),
        (15.4, "wait", "Envoy"),
        (15.0, "silence", None),
        (100.2, "wait", "Cloudflare"),
        (601.0, "silence", "SDKs"),
        (47.0, "silence", None),
    ],
)
def test_known_limits(seconds: float, clock: str, known: str | None) -> None:
    """Those of about the same length that count from the same."""
    one = Fingerprint("r", "p", "client", clock, seconds, 9, 9)  # type: ignore[arg-type]  # drawn from a table
    words = advice(one)
    assert known in words if known else "(" not in words
