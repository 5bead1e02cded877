"""The kinds of values that keys take: each with its words, its reader and how it is shown.

A kind joins a reader of ``values.py``, ``readers.py`` or ``url.py`` to the words of the reference
and to the redacted view.  If a reader needs to know more than its value, a function makes the
reader for the table that the value stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import msgspec

from llmproxy.config.authority import check_time, signing_chain
from llmproxy.config.endpoints import endpoint, endpoint_for_tls
from llmproxy.config.engine_url import engine_url
from llmproxy.config.host_pattern import host_name_pattern
from llmproxy.config.keypair import certificate_chain, private_key
from llmproxy.config.parent_proxy import direct_host, parent_proxy, parent_proxy_or_none
from llmproxy.config.postgres import postgres_url
from llmproxy.config.readers import (
    added_header_name,
    added_parameter_name,
    argument,
    digest,
    failure,
    field_value,
    file_of_instance,
    header_name,
    host_value,
    key_query,
    parameter_name,
    parameter_value,
    reference,
    time_to_live,
    web_origin,
)
from llmproxy.config.schema import Key, Kind, Reader, Section, Table, redacted
from llmproxy.config.tunnel_target import tunnel_target
from llmproxy.config.url import url
from llmproxy.config.values import (
    Wrong,
    boolean,
    boolean_or,
    choice,
    duration,
    duration_or_off,
    filler_size,
    instant,
    integer,
    model_pattern,
    show,
    show_duration,
    show_instant,
    show_size,
    size,
    size_above_zero,
    text,
)
from llmproxy.dialects.dialect import Dialect

Show = Callable[[Any], object]
S = TypeVar("S", bound=msgspec.Struct)


def _unchanged(value: object) -> object:
    return value


def _presence(value: object) -> bool:
    return value is not None


def _where_set(show: Callable[[Any], str]) -> Show:
    return lambda value: None if value is None else show(value)


def of_table(
    reader: Callable[[Table], Reader[Any]], words: str = "string", show: Show = _unchanged
) -> Kind:
    """Return the kind of a single value; ``reader`` makes its reader for the table it stands in."""

    def read(table: Table, key: Key) -> object:
        return table.read(key.name, reader(table), table.default(key))

    return Kind(words, read, show)


def value(reader: Reader[Any], words: str = "string", show: Show = _unchanged) -> Kind:
    """Return the kind of a single value whose ``reader`` needs to know nothing else."""
    return of_table(lambda table: reader, words, show)


def one_of(words: Mapping[str, Any]) -> Kind:
    """Return the kind of one of ``words``, which stand for their values."""
    stated = ", ".join(f'``"{word}"``' for word in words)
    return value(choice(dict(words)), f"one of {stated}", str)


def word_of(literal: object) -> Kind:
    """Return the kind of one of the words of a ``Literal``."""
    return one_of({word: word for word in get_args(literal)})


def whole_number(lowest: int, highest: int) -> Kind:
    """Return the kind of a whole number from ``lowest`` to ``highest``."""
    return value(integer(lowest, highest), f"whole number from {lowest} to {highest}")


def array(
    reader: Callable[[Table], Reader[Any]],
    words: str = "array of strings",
    *,
    empty_beside: str = "",
    may_be_empty: bool = False,
    show: Show = lambda items: None if items is None else list(items),
) -> Kind:
    """Return the kind of an array.

    Args:
        reader: makes the reader of an item for the table that the array stands in.
        words: as :class:`Kind` has it.
        empty_beside: a key beside which the array may be empty.
        may_be_empty: it may be empty, whatever is beside it.
        show: as :class:`Kind` has it.
    """

    def read(table: Table, key: Key) -> object:
        default = () if key.needed else table.default(key)
        bare = may_be_empty or empty_beside in table
        return table.array(key.name, reader(table), default, may_be_empty=bare)

    return Kind(words, read, show)


def one_or_more(reader: Reader[Any]) -> Kind:
    """Return the kind of an array of values, or of one value that stands for an array of it."""
    several = array(lambda table: reader, may_be_empty=True)
    missing = object()

    def read(table: Table, key: Key) -> object:
        if not table.is_string(key.name):
            return several.read(table, key)
        found = table.read(key.name, reader, missing)
        return table.default(key) if found is missing else (found,)

    return Kind("array of strings, or string", read, several.show)


def part(section: Section) -> Kind:
    """Return the kind of a table in which some of the keys of ``section`` are set."""

    def read(table: Table, key: Key) -> object:
        inner = table.table(key.name, section)
        return {name: inner.take(name) for name in section.names if name in inner}

    def show_part(values: Mapping[str, object]) -> object:
        return {name: section.keys[name].kind.show(one) for name, one in values.items()}

    return Kind("table", read, show_part)


def inner(struct: type[msgspec.Struct], section: Section) -> Kind:
    """Return the kind of a table that is read into a ``struct``; an absent one is the default."""

    def read(table: Table, key: Key) -> object:
        default = table.default(key)
        return table.table(key.name, section).struct(struct) if key.name in table else default

    return Kind("table", read, lambda found: None if found is None else redacted(found))


def credential_or(struct: type[msgspec.Struct], section: Section) -> Kind:
    """Return the kind of a credential file's name, or of a table that ``struct`` is read from."""

    def read(table: Table, key: Key) -> object:
        if not table.is_table(key.name):
            return CREDENTIAL.read(table, key)
        return table.table(key.name, section).struct(struct)

    def show_credential(value: object) -> object:
        return redacted(value) if isinstance(value, struct) else _presence(value)

    return Kind("string or table", read, show_credential)


def _read_command(table: Table, key: Key) -> tuple[str, ...]:
    words: tuple[str, ...] = _ARGUMENTS.read(table, key)
    if words and not words[0].startswith("/"):
        table.problem(key.name, "expected a program's absolute path first: no shell looks for it")
    return words


def strings_or_tables(
    reader: Callable[[Table], Reader[Any]], struct: type[S], section: Section, show: Show
) -> Kind:
    """Return the kind of an array of strings, or of tables that a ``struct`` is read from.

    A string stands for a table that has the first key of ``section`` alone; ``reader`` makes its
    reader for the table that the array stands in.
    """
    first = next(iter(section.names))

    def read(table: Table, key: Key) -> tuple[S, ...]:
        read_string = reader(table)
        return table.mixed(
            key.name,
            lambda one: struct(**{first: read_string(one)}),
            lambda one: one.struct(struct),
            (),
            section=section,
        )

    return Kind("array of strings or tables", read, show)


def by_name(
    struct: type[msgspec.Struct], section: Section, name: Callable[[Table], Reader[str]]
) -> Kind:
    """Return the kind of a table of tables, each of which is read into a ``struct``."""

    def read(table: Table, key: Key) -> object:
        tables = table.named(key.name, section, name(table))
        return {one: inner.struct(struct) for one, inner in tables.items()}

    return Kind("table", read, lambda found: {name: redacted(one) for name, one in found.items()})


def candidate(table: Table) -> Reader[str]:
    """Return the reader of a name of the route's providers, if the route has some."""
    candidates = table.take("providers")
    return reference(candidates, "one of the route's providers") if candidates else text


def _allowed_route(table: Table) -> Reader[str]:
    known = table.context.routes
    return text if known is None else reference({"*", *known}, 'a route, or "*"')


def pairs(
    name: Callable[[Table], Reader[str]], value_of: Reader[str], *, same: Callable[[str], str]
) -> Kind:
    """Return the kind of a table of names and values, of which only the names are shown.

    Args:
        name: makes the reader of a name for the table that the pairs' table stands in.
        value_of: reads a value.
        same: returns what two names must not share.
    """

    def read(table: Table, key: Key) -> tuple[tuple[str, str], ...]:
        inner = table.table(key.name, None)
        read_name, found = name(table), dict[str, tuple[str, str]]()
        for one in inner:
            try:
                named = read_name(one)
            except Wrong as wrong:
                inner.problem(one, f"expected {wrong.expected}")
                continue
            if (shared := same(named)) in found:
                shown = show(found[shared][0])
                inner.problem(one, f"expected each name once, but {shown} stands there already")
            found[shared] = named, inner.read(one, value_of, "")
        return tuple(found.values())

    return Kind("table of strings", read, lambda fields: [name for name, _ in fields])


def key_digest(table: Table) -> Reader[bytes]:
    """Return the reader of the digest of a key of the client that a table is about."""
    return digest(table.name)


def _signing_chain(table: Table) -> Reader[Any]:
    """Return the reader of a chain that can be used now, if the time is known."""

    def read(value: object) -> object:
        chain = signing_chain(value)
        if table.context.now is not None:
            check_time(chain, table.context.now)
        return chain

    return read


def _added_header(table: Table) -> Reader[str]:
    return lambda one: added_header_name(one, table.take("header"))


BOOLEAN = value(boolean, "boolean")
ACCESS = value(boolean_or("errors"), 'boolean or ``"errors"``')
DURATION = value(duration, "duration", show_duration)
DURATION_OR_OFF = value(duration_or_off, 'duration or ``"off"``', show_duration)
SIZE = value(size, "size", _where_set(show_size))
SIZE_ABOVE_ZERO = value(size_above_zero, "size above zero", show_size)
FILLER = value(filler_size, "size", show_size)
URL = value(url, show=_where_set(str))
ENGINE_URL = value(engine_url, show=_where_set(str))
POSTGRES = value(postgres_url)
PARENT_PROXY = value(parent_proxy, show=_where_set(str))
PARENT_PROXY_OR_NONE = value(parent_proxy_or_none, show=_where_set(str))
DIRECT_HOSTS = array(lambda table: direct_host, may_be_empty=True)
TUNNEL_TARGETS = array(
    lambda table: tunnel_target, may_be_empty=True, show=lambda targets: [*map(str, targets)]
)
DIALECT = one_of({one.value: one for one in Dialect})
ENDPOINT = of_table(lambda table: endpoint(table.context.instance))
FILE = of_table(lambda table: file_of_instance(table.context.instance))
CREDENTIAL = of_table(lambda table: table.context.credentials.read, show=_presence)
_ARGUMENTS = array(lambda table: argument)
COMMAND = Kind("array of strings", _read_command, lambda words: list(words[:1]))
TIME_TO_LIVE = value(time_to_live, "duration", show_duration)
USER_AND_PASSWORD = of_table(
    lambda table: table.context.credentials.user_and_password, show=_presence
)
CERTIFICATE = of_table(
    lambda table: table.context.credentials.pem(certificate_chain), show=_presence
)
PRIVATE_KEY = of_table(lambda table: table.context.credentials.pem(private_key), show=_presence)
SIGNING_CERTIFICATE = of_table(_signing_chain, show=lambda authority: authority.chain.path)
HOST_NAMES = array(lambda table: host_name_pattern)
ENDPOINTS = array(lambda table: endpoint(table.context.instance), empty_beside="listen_tls")
ENDPOINTS_FOR_TLS = array(lambda table: endpoint_for_tls(table.context.instance))
RETRY_ON = array(lambda table: failure, "array of words and statuses", may_be_empty=True)
PROVIDERS = array(lambda table: reference(table.context.providers, "a provider"))
ROUTES = array(_allowed_route)
HOSTS = array(lambda table: host_value)
ORIGINS = array(lambda table: web_origin, may_be_empty=True)
DROPPED = array(lambda table: header_name, may_be_empty=True)
KEY_QUERY = value(key_query, "boolean or string", lambda name: name or False)
MODELS = array(lambda table: model_pattern)
DIGEST = of_table(key_digest)
INSTANT = value(instant, "date and time", _where_set(show_instant))
DROPPED_PARAMETERS = array(lambda table: parameter_name)
HEADERS = pairs(_added_header, field_value, same=str)
ROUTE_HEADERS = pairs(lambda table: lambda one: added_header_name(one, ""), field_value, same=str)
PARAMETERS = pairs(lambda table: added_parameter_name, parameter_value, same=str.lower)
