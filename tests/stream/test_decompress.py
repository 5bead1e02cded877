"""Compressed copies: every coding, every cut, and what is not in it."""

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

every_coding = pytest.mark.parametrize(("coding", "packed"), PACKED.values(), ids=PACKED)


def opened(coding: bytes, chunks: Iterable[bytes]) -> bytes:
    """What comes out of these chunks."""
    inflater = Decompressor(coding)
    return b"".join(piece for chunk in chunks for piece in inflater.feed(chunk))


@every_coding
def test_every_cut(coding: bytes, packed: bytes) -> None:
    """What comes out does not depend on how it came in."""
    for at in range(len(packed) + 1):
        assert opened(coding, [packed[:at], packed[at:]]) == TEXT
    assert opened(coding, (packed[at : at + 1] for at in range(len(packed)))) == TEXT


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd"])
def test_what_was_flushed_comes_out_at_once(coding: bytes) -> None:
    """An event is there as soon as the server has flushed it, not when the body ends."""
    flushers: dict[bytes, Callable[[bytes], bytes]] = {}
    gz, df = zlib.compressobj(wbits=31), zlib.compressobj()
    br, zs = brotli.Compressor(), zstd.ZstdCompressor()
    flushers[b"gzip"] = lambda d: gz.compress(d) + gz.flush(zlib.Z_SYNC_FLUSH)
    flushers[b"deflate"] = lambda d: df.compress(d) + df.flush(zlib.Z_SYNC_FLUSH)
    flushers[b"br"] = lambda d: br.process(d) + br.flush()
    flushers[b"zstd"] = lambda d: zs.compress(d, zs.FLUSH_BLOCK)
    inflater = Decompressor(coding)
    for event in (b"data: one\n\n", b"data: two\n\n"):
        assert b"".join(inflater.feed(flushers[coding](event))) == event


@pytest.mark.parametrize("coding", [b"compress", b"gzip, gzip", b"", b"aes128gcm"])
def test_an_unknown_coding(coding: bytes) -> None:
    """What nothing here opens is refused at once."""
    with pytest.raises(BadCoding):
        Decompressor(coding)


@pytest.mark.parametrize(("coding", "known"), [("gzip", True), ("br", False), ("zstd", False)])
def test_without_the_extra(coding: str, known: bool) -> None:
    """Where brotli's and zstd's libraries are not installed, those two are unknown codings."""
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


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd"])
def test_bytes_that_are_not_in_the_coding(coding: bytes) -> None:
    """A body that does not hold what its header says is told from one that does."""
    with pytest.raises(BadCoding):
        opened(coding, [b"data: this is not compressed at all\n\n" * 20])


def test_garbage_behind_a_member() -> None:
    """What follows a gzip member is another one, padding, or an error."""
    with pytest.raises(BadCoding):
        opened(b"gzip", [gzip.compress(TEXT), b"garbage"])


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        (b"gzip", gzip.compress),
        (b"deflate", zlib.compress),
        (b"br", brotli.compress),
        (b"zstd", zstd.compress),
    ],
)
def test_a_bomb_is_given_up(coding: bytes, pack: Callable[[bytes], bytes]) -> None:
    """What grows a thousandfold is given up early, and comes out in small pieces until then."""
    packed = pack(b"\0" * 50 * 1024**2)
    inflater = Decompressor(coding)
    sizes: list[int] = []
    with pytest.raises(Bomb):
        sizes.extend(map(len, inflater.feed(packed)))
    assert max(sizes) <= 128 * 1024
    assert sum(sizes) <= 1024**2 + 100 * len(packed) + 128 * 1024


@given(
    st.sampled_from([b"gzip", b"deflate", b"br", b"zstd"]),
    st.lists(st.binary(max_size=60), max_size=10),
)
def test_garbage(coding: bytes, chunks: list[bytes]) -> None:
    """Any bytes come out, or are refused as what they are."""
    with suppress(BadCoding, Bomb):
        opened(coding, chunks)
