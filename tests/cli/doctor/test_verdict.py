"""From what was seen to findings and to the guilty hop: a table of cases, no socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from llmproxy.cli.doctor.advice import advice
from llmproxy.cli.doctor.examination import Observations, Told, Unread
from llmproxy.cli.doctor.exchange import End, Read, Seen
from llmproxy.cli.doctor.hops import NODE, hops_of
from llmproxy.cli.doctor.verdict import Guilt, Kind, Level, State, Verdict, blame, judge, judge_all
from tests.cli.doctor.made import OPEN, arrived, at_url, every, paced

ON_TIME = every(0.25, 20)
HELD = [4.752] * 20
LATER = [at + 0.45 for at in ON_TIME[:-2]] + ON_TIME[-2:]
STREAM = paced(ON_TIME)
NGINX = [("server", "nginx/1.22.1"), *OPEN]
LLMPROXY = [("x-llmproxy-request-id", "a"), *OPEN]
MIB = 1024**2


def kinds(seen: Observations, *, least: Level = Level.WARNING) -> list[Kind]:
    """The kinds of findings that are at least that bad."""
    levels = [*Level]
    found = judge(seen).findings
    return [one.kind for one in found if levels.index(one.level) <= levels.index(least)]


def changed(seen: Seen, **more: Any) -> Seen:
    """The same, but for these attributes."""
    return msgspec.structs.replace(seen, **more)


def test_a_stream_that_streams() -> None:
    """Nothing is wrong with it, and nothing is noted."""
    verdict = judge(at_url(STREAM))
    assert (verdict.state, verdict.findings) == (State.HEALTHY, [])
    assert verdict.words == "streams: 20 events, one by one"


@pytest.mark.parametrize(
    ("seen", "kind", "words"),
    [
        pytest.param(
            at_url(paced(HELD), wide=paced(HELD, size=4000)),
            Kind.HELD,
            "held until the end: 20 events at once, after 4.8 s",
            id="held",
        ),
        pytest.param(
            at_url(
                paced(HELD),
                wide=changed(
                    paced([at + 0.25 for at in ON_TIME[:-1]] + ON_TIME[-1:], size=4000),
                    reads=[type(one)(one.at, 4096) for one in STREAM.reads[:-1]],
                ),
            ),
            Kind.BLOCKS,
            "held in blocks of 4,096 bytes: this stream is shorter than one",
            id="a block that is longer than the stream",
        ),
        pytest.param(
            at_url(
                changed(
                    paced([at for at in every(1.25, 4, late=1.0) for _ in range(5)]),
                    reads=[Read(at, 1024) for at in every(1.25, 4, late=1.0)],
                ),
                wide=changed(
                    paced([at + 0.25 for at in ON_TIME[:-1]] + ON_TIME[-1:], size=4000),
                    reads=[Read(at, 4096) for at in ON_TIME[:-1]],
                ),
            ),
            Kind.BLOCKS,
            "held in blocks of 1,024 bytes",
            id="a block of which several are read at once",
        ),
        pytest.param(
            at_url(paced(HELD), wide=paced(ON_TIME, size=4000)),
            Kind.BLOCKS,
            "held in blocks of a few kilobytes: more passes",
            id="a small buffer",
        ),
        pytest.param(
            at_url(
                paced([at for at in every(0.75, 7, late=0.7) for _ in range(3)][:20]),
                wide=paced([at for at in every(0.75, 7, late=0.7) for _ in range(3)][:20]),
            ),
            Kind.LATE,
            "events are up to 500 ms late, several at a time",
            id="a timer, not a size",
        ),
        pytest.param(
            at_url(paced([at + 0.2 for at in ON_TIME[:-1]] + ON_TIME[-1:])),
            Kind.LATE,
            "each event is 200 ms late",
            id="late",
        ),
        pytest.param(
            at_url(paced(HELD, fields=[("content-encoding", "gzip")]), plain=STREAM),
            Kind.COMPRESSED,
            "compressed with gzip, and held until the end: 20 events at once, after 4.8 s; without "
            "compression it streams",
            id="compressed",
        ),
        pytest.param(
            at_url(
                paced(HELD, fields=[("content-encoding", "gzip")]),
                plain=paced(HELD),
                wide=paced(HELD),
            ),
            Kind.HELD,
            "held until the end: 20 events at once, after 4.8 s",
            id="compressed, but held without compression, too",
        ),
        pytest.param(
            at_url(arrived([6.0] * 60)),
            Kind.HELD,
            "held until the end: 60 events at once, after 6.0 s, as it looks",
            id="held, by arrivals alone",
        ),
        pytest.param(
            at_url(changed(paced([]), end=End.OPEN, end_s=60.0)),
            Kind.HELD,
            "nothing of the body came within 60 s",
            id="only a head",
        ),
        pytest.param(
            at_url(changed(paced(ON_TIME[:8]), end=End.CUT, end_s=15.0)),
            Kind.CUT,
            "the stream broke off: the connection was closed before its end, after 15.0 s",
            id="cut",
        ),
        pytest.param(
            at_url(
                STREAM,
                silence=changed(paced(every(0.05, 2)), end=End.CUT, end_s=60.052),
                silence_s=90.0,
            ),
            Kind.CUT_IN_SILENCE,
            "cut after 60.0 s of silence",
            id="cut in a silence",
        ),
        pytest.param(
            at_url(
                STREAM,
                silence=changed(paced(every(0.05, 2)), end=End.WHOLE, end_s=60.052),
                silence_s=90.0,
            ),
            Kind.CUT_IN_SILENCE,
            "cut after 60.0 s of silence, as if it were whole",
            id="cut in a silence without a trace",
        ),
        pytest.param(
            at_url(
                STREAM,
                silence=changed(paced(every(0.05, 3)), end=End.OPEN, end_s=100.0),
                silence_s=90.0,
            ),
            Kind.CUT_IN_SILENCE,
            "a silence of 90 s is cut, but its client is not told: it waits for ever",
            id="cut in a silence, and the client waits",
        ),
        pytest.param(
            at_url(
                paced(HELD), wide=paced([1.252] * 6 + [at + 0.2 for at in ON_TIME[6:]], size=4000)
            ),
            Kind.HELD_AT_FIRST,
            "the first 24,000 bytes are held, and the rest streams",
            id="a buffer that is filled once",
        ),
        pytest.param(
            at_url(paced(LATER, fields=[("content-encoding", "gzip")]), plain=STREAM),
            Kind.COMPRESSED,
            "compressed with gzip, and each event is 450 ms late; without compression it streams",
            id="compressed, and late",
        ),
    ],
)
def test_what_spoils_a_stream(seen: Observations, kind: Kind, words: str) -> None:
    """One finding, in words, and the word for the exit code."""
    verdict = judge(seen)
    assert kinds(seen) == [kind]
    assert (verdict.state, verdict.words) == (State.BUFFERED, words)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        pytest.param(Seen(problem="no such host"), "no such host", id="no connection"),
        pytest.param(
            changed(
                STREAM, status=401, excerpt=b'{"error": {"message": "a key\\u001b is needed"}}'
            ),
            "refused with 401: a key  is needed (--key-file?)",
            id="no key",
        ),
        pytest.param(
            changed(STREAM, status=502, excerpt=b"<html>"), "refused with 502", id="no provider"
        ),
        pytest.param(
            changed(STREAM, status=301, fields=[("location", "https://b.example/")]),
            "it redirects to https://b.example/, which is not followed",
            id="a redirect",
        ),
        pytest.param(
            changed(STREAM, events=[], fields=[("content-type", "text/html; charset=utf-8")]),
            "a whole response of type text/html and no stream: is it the right path?",
            id="a page",
        ),
        pytest.param(paced([]), "the response is empty", id="nothing"),
    ],
)
def test_what_cannot_be_measured(stream: Seen, words: str) -> None:
    """The reason is told, and nothing else is found."""
    verdict = judge(at_url(stream))
    assert (verdict.state, verdict.words) == (State.UNREACHABLE, words)
    assert len(verdict.findings) == 1


def test_http_1_0_that_is_refused() -> None:
    """A 426 for what the doctor asks in HTTP/1.1 is that of a hop's own request."""
    refused = changed(STREAM, status=426, fields=NGINX)
    assert kinds(at_url(refused)) == [Kind.REFUSED, Kind.ASKED_IN_1_0]
    (guilt,) = blame(verdicts(refused, STREAM))
    assert (guilt.kind, guilt.programs) == (Kind.ASKED_IN_1_0, ["nginx"])
    assert advice(guilt)[0].lines[0] == "proxy_http_version 1.1;"


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        pytest.param({"broken": paced(ON_TIME[:5])}, Kind.BREAK_HIDDEN, id="looks whole"),
        pytest.param({"broken": paced([], end=End.OPEN)}, Kind.BREAK_LOST, id="does not end"),
        pytest.param(
            {"broken": changed(paced([], end=End.OPEN), status=None)},
            Kind.BREAK_LOST,
            id="no response to a broken one",
        ),
        pytest.param({"cancel_sending": Told(None)}, Kind.CANCEL_LOST, id="not told"),
        pytest.param(
            {"cancel_sending": Told(0.1), "cancel_silent": Told(None)},
            Kind.CANCEL_LOST_IN_SILENCE,
            id="not told in a silence",
        ),
        pytest.param({"unread": Unread(48 * MIB, False)}, Kind.TAKES_MUCH, id="takes all"),
        pytest.param(
            {"arrived": {"x-envoy-expected-rq-timeout-ms": "15000"}},
            Kind.LIMIT_AHEAD,
            id="a limit ahead",
        ),
        pytest.param({"arrived": {"version": "1.0"}}, Kind.ASKED_IN_1_0, id="HTTP/1.0"),
    ],
)
def test_what_is_warned_of(more: dict[str, Any], kind: Kind) -> None:
    """It does not hold a stream back, so that the exit code is not about it."""
    seen = at_url(STREAM, **more)
    assert kinds(seen) == [kind]
    assert judge(seen).state is State.HEALTHY


@pytest.mark.parametrize(
    "more",
    [
        {"broken": paced(ON_TIME[:5], end=End.CUT)},
        {"broken": paced(ON_TIME[:5], end=End.RESET)},
        {"cancel_sending": Told(0.1), "cancel_silent": Told(0.2)},
        {"unread": Unread(8 * MIB, True)},
        {"unread": Unread(8 * MIB, False)},  # a slow line: more could not come in time
        {"broken": changed(paced([], end=End.CUT), status=None)},
        {"silence": changed(STREAM, end_s=90.1), "silence_s": 90.0},
        {"silence": changed(STREAM, end=End.OPEN, end_s=100.0), "silence_s": 90.0},
        {"arrived": {"version": "1.1", "x-envoy-expected-rq-timeout-ms": "0"}},
    ],
)
def test_what_is_as_it_should_be(more: dict[str, Any]) -> None:
    """Nothing is found."""
    assert judge(at_url(STREAM, **more)).findings == []


def test_what_a_head_tells() -> None:
    """A length, no framing, and missing words for hops in front."""
    assert kinds(at_url(changed(STREAM, framing="length"))) == [Kind.LENGTH_KNOWN]
    assert kinds(at_url(changed(STREAM, framing="close"))) == [Kind.UNFRAMED]
    bare = judge(at_url(paced(ON_TIME, fields=[])))
    assert [one.kind for one in bare.findings] == [Kind.INVITES_BUFFERING]
    assert bare.findings[0].text.endswith(
        "no X-Accel-Buffering: no, no Cache-Control: no-transform"
    )
    behind_nginx = judge(at_url(paced(ON_TIME, fields=[("server", "nginx"), OPEN[1]])))
    assert behind_nginx.findings == []  # it takes the other one out


def test_the_worst_comes_first() -> None:
    """And decides about the URL."""
    silence = changed(paced(every(0.05, 2)), end=End.CUT, end_s=60.052)
    broken, bare = paced(ON_TIME[:5]), paced(ON_TIME, fields=[])
    seen = at_url(bare, broken=broken, silence=silence, silence_s=90.0)
    assert kinds(seen, least=Level.NOTE) == [
        *(Kind.CUT_IN_SILENCE, Kind.BREAK_HIDDEN, Kind.INVITES_BUFFERING),
    ]
    assert judge(seen).words == "cut after 60.0 s of silence"


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (arrived([0.1] * 60), "all 60 events within 0 ms: too quick to tell whether it is held"),
        (arrived(every(0.1, 3)), "only 3 events: too few to tell whether it is held"),
    ],
)
def test_what_cannot_be_told(stream: Seen, words: str) -> None:
    """It is a warning, and no fault."""
    verdict = judge(at_url(stream))
    assert (verdict.state, [one.text for one in verdict.findings]) == (State.HEALTHY, [words])


def test_a_single_event_on_time_tells_how_late_the_others_are() -> None:
    """In a stream that HAProxy holds there is one, the last, which a busy machine may delay."""
    stream, plain, broken = (
        paced([*[at + 0.2 for at in ON_TIME[:-1]], ON_TIME[-1] + delay]) for delay in (0.15, 0.1, 0)
    )
    seen = at_url(stream, plain=plain, broken=broken)
    assert kinds(seen)[0] is Kind.LATE
    assert judge(seen).words == "each event is 200 ms late"
    assert kinds(at_url(stream, plain=plain))[:1] != [Kind.LATE]  # there is nothing to go by


def test_compressed_and_late_for_two_reasons() -> None:
    """A timer makes each event late, and compression later: both are told, and HAProxy is known."""
    late = paced([at + 0.2 for at in ON_TIME[:-1]] + ON_TIME[-1:])
    seen = at_url(paced(LATER, fields=[("content-encoding", "gzip")]), plain=late)
    assert kinds(seen) == [Kind.COMPRESSED, Kind.LATE]
    assert judge(seen).words == (
        "compressed with gzip, and each event is 450 ms late; without compression each event is "
        "200 ms late"
    )
    behind = at_url(STREAM, "http://b.example/-/pace")
    assert [one.programs for one in blame(judge_all([seen, behind]))] == [["HAProxy"]] * 2


def test_a_single_event_that_is_later_does_not_hide_the_timer() -> None:
    """What is late in the middle tells the timer, whatever the machine did for a moment."""
    late = [at + 0.2 for at in ON_TIME[:-1]] + ON_TIME[-1:]
    late[7] += 0.2
    found = blame(judge_all([at_url(paced(late)), at_url(STREAM, "http://b.example/-/pace")]))
    assert [one.programs for one in found] == [["HAProxy"]]


def test_compressed_but_not_held() -> None:
    """It is noted, and no fault."""
    seen = at_url(paced(ON_TIME, fields=[("content-encoding", "gzip"), *OPEN]), plain=STREAM)
    assert kinds(seen, least=Level.NOTE) == [Kind.COMPRESSED]
    assert judge(seen).state is State.HEALTHY


# --- several URLs ---------------------------------------------------------------------------------


def verdicts(*streams: Seen, **more: Any) -> list[Verdict]:
    """Of URLs a, b and so on, from the client's side to the provider's."""
    return judge_all(
        [
            at_url(stream, f"http://{name}.example/-/pace", **more)
            for name, stream in zip("abc", streams, strict=False)
        ]
    )


def guilty(found: Sequence[Guilt]) -> list[tuple[Kind, str, str | None, list[str]]]:
    """What is told apart by a test."""
    hosts = {None: None} | {f"http://{name}.example/-/pace": name for name in "abc"}
    return [(one.kind, hosts[one.at] or "", hosts[one.before], one.programs) for one in found]


HELD_BY_NGINX = paced(HELD, fields=NGINX)
BY_LLMPROXY = paced(ON_TIME, fields=LLMPROXY)


def test_the_hop_between_two_urls_is_named() -> None:
    """It is the one that tells of itself at the outer URL, and not at the inner one."""
    found = blame(verdicts(HELD_BY_NGINX, BY_LLMPROXY, STREAM))
    assert guilty(found) == [(Kind.HELD, "a", "b", ["nginx"])]
    assert found[0].words == (
        "nginx (server: nginx/1.22.1), between http://a.example/-/pace and http://b.example/-/pace"
    )
    assert [one.program for one in advice(found[0])] == ["nginx"]
    assert "proxy_buffering off;" in advice(found[0])[0].lines


def test_a_hop_further_in_is_not_blamed_on_those_before_it() -> None:
    """All in front of it show the same; what shows first is where it begins."""
    found = blame(verdicts(HELD_BY_NGINX, paced(HELD, fields=LLMPROXY), STREAM))
    assert guilty(found) == [(Kind.HELD, "b", "c", ["llmproxy"])]


def test_another_fault_further_in_does_not_excuse_a_hop() -> None:
    """Only one of the same kind does; and a note of it does not."""
    behind = judge(at_url(BY_LLMPROXY, "http://b.example/-/pace", cancel_sending=Told(None)))
    found = blame([judge(at_url(HELD_BY_NGINX)), behind])
    assert guilty(found) == [
        (Kind.HELD, "a", "b", ["nginx"]),
        (Kind.CANCEL_LOST, "b", None, ["llmproxy"]),
    ]
    packed = paced(ON_TIME, fields=[("content-encoding", "gzip"), *LLMPROXY])
    found = blame(verdicts(HELD_BY_NGINX, packed))
    assert guilty(found) == [(Kind.HELD, "a", "b", ["nginx"])]


def test_one_that_holds_in_another_way_in_front_of_one_that_holds() -> None:
    """It may be innocent: what comes in blocks can look held further out."""
    in_blocks = paced([at for at in every(1.25, 4, late=1.0) for _ in range(5)], fields=LLMPROXY)
    found = blame(verdicts(HELD_BY_NGINX, in_blocks, STREAM))
    assert guilty(found) == [(Kind.BLOCKS, "b", "c", ["llmproxy"])]


def test_what_is_too_quick_to_tell_alone_is_told_by_the_url_behind_it() -> None:
    """The same stream takes its time there, so that a model cannot have been as quick here."""
    quick, slow = arrived([0.9] * 30, fields=NGINX), arrived(every(0.03, 30))
    assert guilty(blame(verdicts(quick, slow))) == [(Kind.HELD, "a", "b", ["nginx"])]
    assert verdicts(quick, slow)[0].words == (
        "held until the end: 30 events at once, after 0.9 s, as it looks"
    )
    for outer, inner in ((quick, quick), (slow, quick), (arrived([0.9] * 6), slow)):
        assert blame(verdicts(outer, inner)) == []


def test_one_url_alone() -> None:
    """Whoever tells of itself there is likely the one, but not llmproxy, whose stream it is."""
    both = paced(HELD, fields=[("server", "nginx/1.22.1"), *LLMPROXY])
    assert guilty(blame(verdicts(both))) == [(Kind.HELD, "a", None, ["nginx"])]
    found = blame(verdicts(paced(HELD)))
    assert guilty(found) == [(Kind.HELD, "a", None, [])]
    assert found[0].words.startswith("the server itself, or a hop that does not name itself, at ")


def test_a_hop_without_a_name_is_known_by_what_it_does_to_breaks() -> None:
    """Node's http-proxy, and Vite, which is made of it, leave their client waiting."""
    lost = judge(at_url(STREAM, broken=paced([], end=End.OPEN), cancel_sending=Told(None)))
    found = blame([lost, judge(at_url(STREAM, "http://b.example/-/pace"))])
    assert [one.programs for one in found] == [[NODE], [NODE]]
    assert "up.on('aborted', () => res.destroy())" in advice(found[0])[0].lines[1]
    assert advice(found[1]) == advice(found[0])[:1]  # one line for both
    assert blame([lost])[0].programs == []


def test_a_hop_without_a_name_is_known_by_its_timer() -> None:
    """HAProxy adds nothing to a head, but 200 ms to each event."""
    held = paced([at + 0.2 for at in ON_TIME[:-1]] + ON_TIME[-1:])
    behind = judge(at_url(STREAM, "http://b.example/-/pace"))
    late, lost = blame([*verdicts(held, cancel_silent=Told(None)), behind])
    assert late.words.startswith("HAProxy (it does not name itself, but holds events for 200 ms), ")
    assert (late.programs, lost.programs) == (["HAProxy"], ["HAProxy"])
    assert [one.lines for one in advice(late)] == [("option http-no-delay",)]
    later = paced([at + 0.6 for at in ON_TIME[:-1]] + ON_TIME[-1:])
    assert blame(verdicts(later, STREAM))[0].programs == []


def test_a_url_that_was_not_measured_says_nothing_of_the_hop() -> None:
    """What is behind it is not known."""
    found = blame(verdicts(HELD_BY_NGINX, Seen(problem="it is away")))
    assert guilty(found) == [(Kind.HELD, "a", None, ["nginx"])]
    assert "the next URL was not measured" in found[0].words


def test_notes_and_what_cannot_be_measured_are_nobodys_guilt() -> None:
    """Only what a hop does is put down to one."""
    assert blame(verdicts(paced(ON_TIME, fields=[]), STREAM)) == []
    assert blame(verdicts(Seen(problem="it is away"))) == []
    assert blame(verdicts(changed(STREAM, framing="close"))) == []


@pytest.mark.parametrize(
    ("fields", "arrived", "programs"),
    [
        ([("server", "nginx/1.22.1")], None, ["nginx"]),
        ([("server", "Caddy"), ("server", "uvicorn")], None, ["Caddy"]),
        ([("via", "1.1 Caddy")], None, ["Caddy"]),
        ([("server", "envoy"), ("x-envoy-upstream-service-time", "3")], None, ["Envoy"]),
        ([("server", "Apache/2.4.71 (Debian)")], None, ["Apache"]),
        ([("x-varnish", "32770"), ("via", "1.1 host (Varnish/7.1)")], None, ["Varnish"]),
        ([("x-powered-by", "Next.js")], None, ["Next.js"]),
        ([("server", "cloudflare"), ("cf-ray", "1")], None, ["Cloudflare"]),
        ([("server", "awselb/2.0")], None, ["AWS ALB"]),
        ([("x-llmproxy-request-id", "a")], None, ["llmproxy"]),
        ([], {"x-forwarded-server": "t", "x-real-ip": "127.0.0.1"}, ["Traefik"]),
        ([], {"x-forwarded-server": "a"}, []),
        ([], {"x-envoy-expected-rq-timeout-ms": "15000"}, ["Envoy"]),
        ([("server", "uvicorn")], None, []),
    ],
)
def test_programs_that_tell_of_themselves(
    fields: list[tuple[str, str]], arrived: dict[str, str] | None, programs: list[str]
) -> None:
    """Each once, by a response's head or by what they add to a request."""
    assert [hop.program for hop in hops_of(fields, arrived)] == programs


def test_a_head_cannot_steer_the_terminal() -> None:
    """Bytes above ASCII may stand in a value, and some are a terminal's commands."""
    (hop,) = hops_of([("server", "nginx\x9b31m" + "x" * 500)])
    assert "\x9b" not in hop.evidence
    assert len(hop.evidence) < 200
    packed = judge(at_url(paced(ON_TIME, fields=[("content-encoding", "x\x9b31m"), *OPEN])))
    assert "\x9b" not in packed.words + packed.findings[0].text


@pytest.mark.parametrize(
    "program",
    ["nginx", "HAProxy", "Caddy", "Envoy", "Traefik", "Apache", "Varnish", "Next.js", "Cloudflare"],
)
@pytest.mark.parametrize("kind", [Kind.HELD, Kind.COMPRESSED])
def test_there_is_a_line_for_each_program(program: str, kind: Kind) -> None:
    """That holds a stream back, or compresses it."""
    guilt = Guilt(kind=kind, at="http://a.example", before=None, programs=[program], words="")
    found = [one for one in advice(guilt) if one.program == program]
    assert found
    assert found[0].lines or found[0].note


@pytest.mark.parametrize("program", ["Cloudflare", "AWS ALB"])
def test_what_cannot_be_run_here_is_marked(program: str) -> None:
    """Their lines come from their documentation."""
    for kind in Kind:
        guilt = Guilt(kind=kind, at="http://a.example", before=None, programs=[program], words="")
        assert not any(one.tried for one in advice(guilt) if one.program == program)
