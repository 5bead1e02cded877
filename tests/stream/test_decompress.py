"""Compressed copies: every coding, split at any point, and bytes of no coding."""

from __future__ import annotations

import gzip
import os
import random
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from llmproxy.stream.decompress import KNOWN_CODINGS, BadCoding, Bomb, Decompressor
from tests.stream.splits import every_split

TEXT = "".join(f'data: {{"n":{n},"t":"für {n * n}"}}\n\n' for n in range(60)).encode()


def _raw_deflate(data: bytes, level: int = 6) -> bytes:
    packer = zlib.compressobj(level, wbits=-15)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": (b"gzip", gzip.compress(TEXT)),
    "gzip in members": (b"x-gzip", gzip.compress(TEXT[:99]) + gzip.compress(TEXT[99:])),
    "gzip and padding": (b" GZIP", gzip.compress(TEXT) + b"\0" * 20),
    "zlib": (b"deflate", zlib.compress(TEXT)),
    "raw deflate": (b"deflate", _raw_deflate(TEXT)),
    "raw deflate, stored": (b"deflate", _raw_deflate(TEXT, 0)),
    "brotli": (b"br", brotli.compress(TEXT)),
    "zstd": (b"zstd", zstd.compress(TEXT)),
    "zstd in frames": (b"zstd", zstd.compress(TEXT[:99]) + zstd.compress(TEXT[99:])),
}

PACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"deflate": zlib.compress,
    b"br": partial(brotli.compress, quality=5),  # its best takes ten seconds for 64 MiB
    b"zstd": zstd.compress,
}

every_coding = pytest.mark.parametrize(("coding", "packed"), PACKED.values(), ids=PACKED)


def no_time() -> float:
    """A clock that stands still."""
    return 0.0


def opened(coding: bytes, chunks: Iterable[bytes]) -> bytes:
    """Return the decompressed chunks."""
    decompressor = Decompressor(coding, no_time)
    return b"".join(piece for chunk in chunks for piece in decompressor.feed(chunk))


@every_coding
def test_a_copy_may_be_split_at_any_point(coding: bytes, packed: bytes) -> None:
    """The chunks of the input do not change the output."""
    for chunks in every_split(packed):
        assert opened(coding, chunks) == TEXT


@pytest.mark.parametrize("coding", PACKERS)
def test_flushed_bytes_are_decompressed_at_once(coding: bytes) -> None:
    """An event is there when the server has flushed it, not when the body ends."""
    gz, df = zlib.compressobj(wbits=31), zlib.compressobj()
    br, zs = brotli.Compressor(), zstd.ZstdCompressor()
    flushers: dict[bytes, Callable[[bytes], bytes]] = {
        b"gzip": lambda d: gz.compress(d) + gz.flush(zlib.Z_SYNC_FLUSH),
        b"deflate": lambda d: df.compress(d) + df.flush(zlib.Z_SYNC_FLUSH),
        b"br": lambda d: br.process(d) + br.flush(),
        b"zstd": lambda d: zs.compress(d, zs.FLUSH_BLOCK),
    }
    decompressor = Decompressor(coding, no_time)
    for event in (b"data: one\n\n", b"data: two\n\n"):
        assert b"".join(decompressor.feed(flushers[coding](event))) == event


@pytest.mark.parametrize("coding", [b"compress", b"gzip, gzip", b"", b"aes128gcm"])
def test_an_unknown_coding_is_refused(coding: bytes) -> None:
    """The error comes before any byte."""
    with pytest.raises(BadCoding):
        Decompressor(coding, no_time)


def test_the_codings_that_sdks_accept_are_known() -> None:
    """A default install reads all four; their names are what a 415 offers."""
    assert KNOWN_CODINGS == (b"gzip", b"deflate", b"br", b"zstd")
    for coding in (*KNOWN_CODINGS, b"x-gzip", b" GZIP "):
        Decompressor(coding, no_time)


@pytest.mark.parametrize(
    ("coding", "chunks"),
    [
        *((coding, [b"data: not compressed at all\n\n" * 20]) for coding in PACKERS),
        (b"gzip", [gzip.compress(TEXT), b"garbage"]),
    ],
)
def test_bytes_of_no_coding_are_refused(coding: bytes, chunks: list[bytes]) -> None:
    """Plain bytes are refused, and garbage after a gzip member, too."""
    with pytest.raises(BadCoding):
        opened(coding, chunks)


@pytest.mark.parametrize("coding", PACKERS)
def test_a_bomb_is_refused(coding: bytes) -> None:
    """Bytes that grow a thousandfold are refused early; until then the pieces are small."""
    packed = PACKERS[coding](b"\0" * 50 * 1024**2)
    decompressor = Decompressor(coding, no_time)
    sizes: list[int] = []
    with pytest.raises(Bomb):
        sizes.extend(map(len, decompressor.feed(packed)))
    assert max(sizes) <= 128 * 1024
    assert sum(sizes) <= CREDIT + 128 * 1024


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 98_272, 98_273, 400_000])
@pytest.mark.parametrize("coding", PACKERS)
def test_a_last_read_may_bring_several_pieces(coding: bytes, size: int) -> None:
    """All of them come, although the decoder has taken the whole input before the first one."""
    plain = b"".join(b"%06d " % number for number in range(60_000))[:size]
    assert opened(coding, [PACKERS[coding](plain)]) == plain


@pytest.mark.parametrize("window", [22, 23, 24])
def test_a_brotli_window_is_bounded(window: int) -> None:
    """A window is filled in one step: 16 MiB would hold up the reactor for 30 ms."""
    packed = brotli.compress(b"\0" * 20 * 1024**2, lgwin=window, quality=5)
    decompressor = Decompressor(b"br", no_time)
    with pytest.raises(Bomb if window == 22 else BadCoding):
        list(decompressor.feed(packed))


READ = 80 * 1024
"""Most bytes of one read of a connection."""

CREDIT = 3 * 1024**2


def given_of(decompressor: Decompressor, data: bytes) -> tuple[int, bool]:
    """Return how much output came of one read, and whether it was refused as a bomb."""
    given = 0
    try:
        for piece in decompressor.feed(data):
            given += len(piece)
    except Bomb:
        return given, True
    return given, False


@pytest.mark.parametrize("coding", PACKERS)
def test_one_read_brings_a_bounded_output(coding: bytes) -> None:
    """Neither megabytes that grew little nor an hour of rest are more than the whole credit."""
    clock = Clock()
    decompressor = Decompressor(coding, clock.seconds)
    packed = PACKERS[coding](os.urandom(2 * 1024**2) + b"\0" * 64 * 1024**2)
    most, refused = 0, False
    for at in range(0, len(packed), READ):
        given, refused = given_of(decompressor, packed[at : at + READ])
        most = max(most, given)
        if refused:
            break
        clock.advance(3600)
    assert refused
    assert most <= CREDIT + 128 * 1024


def packed_lines() -> bytes:
    """Return a body that is compressed 88 to 1: by matches of 258 bytes and by little else."""
    line = os.urandom(800)
    plain = b"".join(line + os.urandom(3) for _ in range(12_000))
    packed = zlib.compress(plain)
    assert 85 < len(plain) / len(packed) < 91
    return packed


def test_what_comes_faster_than_its_credit_is_refused() -> None:
    """At 88 to 1 and wire speed, 3 MB would cost a second of the reactor."""
    decompressor = Decompressor(b"deflate", no_time)
    packed = packed_lines()
    assert given_of(decompressor, packed[:4096])[1] is False
    assert given_of(decompressor, packed[4096:])[1] is True


def test_time_brings_credit() -> None:
    """The same bytes are read where they take as long as streams do."""
    clock = Clock()
    decompressor = Decompressor(b"deflate", clock.seconds)
    packed = packed_lines()
    for at in range(0, len(packed), 4096):
        assert given_of(decompressor, packed[at : at + 4096])[1] is False
        clock.advance(0.015)
    assert decompressor.is_whole


def test_work_costs_credit() -> None:
    """What is made of the output is paid, too; and time brings it back."""
    clock = Clock()
    decompressor = Decompressor(b"gzip", clock.seconds)
    decompressor.spend(CREDIT)
    with pytest.raises(Bomb):
        decompressor.spend(1)
    clock.advance(1)
    assert given_of(decompressor, gzip.compress(TEXT)) == (len(TEXT), False)
    decompressor.spend(CREDIT - len(TEXT))
    with pytest.raises(Bomb):
        decompressor.spend(1)


@pytest.mark.parametrize(
    ("flushed", "events", "each_s"), [(True, 20_000, 0.001), (False, 4_500, 0.0)]
)
def test_a_long_stream_of_tokens_is_no_bomb(flushed: bool, events: int, each_s: float) -> None:
    """A thousand tokens a second for any time, each in a long event; or thousands at once."""
    clock = Clock()
    words = random.Random(1)
    packer = zlib.compressobj(wbits=31)
    decompressor = Decompressor(b"gzip", clock.seconds)
    filters = b'"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}},' * 5
    packed = b""
    for number in range(events):
        content = "".join(words.choices("etaoin shrdlu", k=words.randint(1, 6)))
        event = b'data: {"id":"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT","object":'
        event += b'"chat.completion.chunk","created":1741569952,"model":"gpt-4o-2024-08-06",'
        event += b'"choices":[{"index":0,' + (filters if flushed else b"")
        event += b'"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % content.encode()
        packed += packer.compress(event)
        if flushed:
            packed += packer.flush(zlib.Z_SYNC_FLUSH)
        clock.advance(each_s)
        if number % 50 == 49:
            for piece in decompressor.feed(packed):
                decompressor.spend(400 * piece.count(b"\n\n"))
            packed = b""


@pytest.mark.parametrize("coding", PACKERS)
def test_a_body_may_end_only_between_members(coding: bytes) -> None:
    """A body that is cut before its end is not whole; nothing at all is."""
    decompressor = Decompressor(coding, no_time)
    packed = PACKERS[coding](TEXT)
    assert decompressor.is_whole
    for at in range(len(packed)):
        list(decompressor.feed(packed[at : at + 1]))
        assert decompressor.is_whole == (at == len(packed) - 1)


@given(
    st.sampled_from(list(PACKERS)),
    st.lists(st.binary(max_size=60), max_size=10),
)
def test_any_bytes_raise_only_their_own_errors(coding: bytes, chunks: list[bytes]) -> None:
    """Bytes are decompressed, or refused as a bad coding or a bomb."""
    with suppress(BadCoding, Bomb):
        opened(coding, chunks)
