"""Compressed copies: every coding, split at any point, and bytes of no coding."""

from __future__ import annotations

import gzip
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.stream.decompress import BadCoding, Bomb, Decompressor
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
    b"br": brotli.compress,
    b"zstd": zstd.compress,
}

every_coding = pytest.mark.parametrize(("coding", "packed"), PACKED.values(), ids=PACKED)


def opened(coding: bytes, chunks: Iterable[bytes]) -> bytes:
    """Return the decompressed chunks."""
    decompressor = Decompressor(coding)
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
    decompressor = Decompressor(coding)
    for event in (b"data: one\n\n", b"data: two\n\n"):
        assert b"".join(decompressor.feed(flushers[coding](event))) == event


@pytest.mark.parametrize("coding", [b"compress", b"gzip, gzip", b"", b"aes128gcm"])
def test_an_unknown_coding_is_refused(coding: bytes) -> None:
    """The error comes before any byte."""
    with pytest.raises(BadCoding):
        Decompressor(coding)


@pytest.mark.parametrize(("coding", "known"), [("gzip", True), ("br", False), ("zstd", False)])
def test_without_their_libraries_two_codings_are_unknown(coding: str, known: bool) -> None:
    """The libraries of brotli and zstd are an extra."""
    program = (
        "import sys; sys.modules.update(brotli=None, backports=None, compression=None)\n"
        "from llmproxy.stream.decompress import Decompressor\n"
        f"Decompressor(b{coding!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.stderr.strip().endswith(f"BadCoding: b{coding!r}" if not known else "")
    assert (run.returncode == 0) is known


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
    decompressor = Decompressor(coding)
    sizes: list[int] = []
    with pytest.raises(Bomb):
        sizes.extend(map(len, decompressor.feed(packed)))
    assert max(sizes) <= 128 * 1024
    assert sum(sizes) <= 1024**2 + 100 * len(packed) + 128 * 1024


@given(
    st.sampled_from(list(PACKERS)),
    st.lists(st.binary(max_size=60), max_size=10),
)
def test_any_bytes_raise_only_their_own_errors(coding: bytes, chunks: list[bytes]) -> None:
    """Bytes are decompressed, or refused as a bad coding or a bomb."""
    with suppress(BadCoding, Bomb):
        opened(coding, chunks)
