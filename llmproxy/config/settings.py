"""The effective configuration: frozen structs, as the rest of the program reads them.

A field with a ``Key`` is a key of the file: this is the one place that names the key, says what it
takes, what its default is, and, in the docstring below the field, what it means (see
``schema.py``).  Those docstrings are the reference of ``docs/configuration.rst``: ``make docs``
writes it anew.

Nothing here opens the file: ``sections.py`` and ``__init__.py`` fill these structs, and everybody
takes them from there.  Durations are seconds as ``float`` and ``None`` where the file says
``"off"``; sizes are bytes.  Two things are kept from ever being printed: a credential's value
(:class:`~.credentials.Secret`) and the digests of client keys (:class:`Client`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from llmproxy.config.authority import Authority
from llmproxy.config.credentials import Secret
from llmproxy.config.engine_url import EngineUrl
from llmproxy.config.keypair import Keypair
from llmproxy.config.kinds import (
    ACCESS,
    BOOLEAN,
    CERTIFICATE,
    COMMAND,
    CREDENTIAL,
    DIALECT,
    DIGEST,
    DIRECT_HOSTS,
    DROPPED,
    DROPPED_PARAMETERS,
    DURATION,
    DURATION_OR_OFF,
    ENDPOINT,
    ENDPOINTS,
    ENDPOINTS_FOR_TLS,
    ENGINE_URL,
    FILE,
    FILLER,
    HEADERS,
    HOST_NAMES,
    HOSTS,
    INSTANT,
    KEY_QUERY,
    MODELS,
    ORIGINS,
    PARAMETERS,
    PARENT_PROXY,
    PARENT_PROXY_OR_NONE,
    POSTGRES,
    PRIVATE_KEY,
    PROVIDERS,
    RETRY_ON,
    ROUTE_HEADERS,
    ROUTES,
    SIGNING_CERTIFICATE,
    SIZE,
    SIZE_ABOVE_ZERO,
    TIME_TO_LIVE,
    TUNNEL_TARGETS,
    URL,
    USER_AND_PASSWORD,
    by_name,
    candidate,
    credential_or,
    inner,
    key_digest,
    one_or_more,
    part,
    strings_or_tables,
    value,
    whole_number,
    word_of,
)
from llmproxy.config.parent_proxy import THIS_MACHINE, DirectHosts, ParentProxy
from llmproxy.config.readers import (
    certificates,
    credential_format,
    header_name,
    route_name,
    route_path,
    session_header,
    visible,
)
from llmproxy.config.schema import Key, Section, redacted
from llmproxy.config.tunnel_target import TunnelTarget
from llmproxy.config.url import Url
from llmproxy.config.values import absolute_path, text, token
from llmproxy.dialects.dialect import Dialect
from llmproxy.http1.headers import ROUTING_FIELDS

AcceptEncoding = Literal["identity", "pass"]
IncludeUsage = Literal["as-asked", "inject"]
OnDisconnect = Literal["cancel", "drain"]
Capture = Literal["usage", "content"]
Balance = Literal["ordered", "least_busy", "weighted"]
Sticky = Literal["off", "session", "client"]
ModelsList = Literal["upstream", "configured"]
AccessLines = bool | Literal["errors"]

_FOR_PROVIDERS = frozenset({"providers.*.timeouts"})
_FOR_BOTH = frozenset({"providers.*.timeouts", "routes.timeouts"})


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """The listeners that clients reach; ``via`` is our pseudonym in Via.

    ``keypair`` is there where ``listen_tls`` is; two keys fill it, with a paragraph for each.
    """

    listen: Annotated[tuple[str, ...], Key(ENDPOINTS)] = ("tcp:8080:interface=127.0.0.1",)
    r"""Endpoints to listen on, in Twisted's notation: ``tcp:``, ``tcp6:``, ``ssl:``, ``tls:``,
    ``unix:`` and ``systemd:`` (a socket that systemd opened). ``haproxy:`` can stand before any of
    them (PROXY protocol). An IPv6 address has a backslash before each colon, so write it in single
    quotes: ``'tcp6:8080:interface=\:\:1'``. ``llmproxy check`` refuses what cannot be listened on;
    only the start shows whether the address is free. The array may be empty if there is a
    ``listen_tls``. Up to 4096 connections wait to be accepted, or as many as ``net.core.somaxconn``
    allows; ``backlog=`` in an endpoint sets another number. The kernel probes a connection after 30
    s of silence, and ends it if the caller has vanished (TCP keepalive). The socket file of
    ``unix:`` is open to its owner and group (mode 0660); ``mode=`` in an endpoint sets another one.
    A ``haproxy:`` listener believes the PROXY header of whoever reaches it: only the balancer may
    reach it, by ``interface=``, a firewall or a ``unix:`` socket. Otherwise any caller can say any
    address."""

    listen_tls: Annotated[tuple[str, ...], Key(ENDPOINTS_FOR_TLS)] = ()
    """Endpoints on which the proxy ends TLS with ``certificate`` and ``key``; see
    `TLS towards callers`_. Every kind of endpoint is allowed except ``ssl:`` and ``tls:``, which
    end TLS themselves. With ``haproxy:`` the balancer's header comes before TLS."""

    reuse_port: Annotated[bool, Key(BOOLEAN)] = False
    """Whether other processes may bind the same ``tcp:`` and ``tcp6:`` addresses
    (``SO_REUSEPORT``). Then one process for each core can serve them, without systemd, and the
    kernel spreads new connections over the processes. Every process needs its own ``--instance``.
    The admin listener and the file names of ``[trace]`` need ``{instance}``. If two daemons take
    the same port by mistake, the start does not report it. `operations.rst <operations.rst>`_ says
    what a restart then means."""

    keypair: Annotated[
        Keypair | None,
        Key(CERTIFICATE, "certificate", stated="needed with ``listen_tls``"),
        Key(PRIVATE_KEY, "key", stated="needed with ``listen_tls``"),
    ] = None
    """Bare name of a credential file in PEM. The file holds the certificate first, then the
    certificates that lead to its root, and nothing else. Without ``listen_tls`` this key is an
    error, and so is ``key``.

    Bare name of a credential file in PEM: the private key of ``certificate``, without a passphrase.
    It is an elliptic key, or an RSA key of 2048 bits or more."""

    anonymous: Annotated[bool, Key(BOOLEAN)] = False
    """Whether the proxy serves a caller without a key, as the client ``anonymous``. A wrong key is
    refused in both cases. If this key is ``false`` and there is no ``[clients.NAME]``, the daemon
    does not start."""

    drain_timeout: Annotated[float, Key(DURATION)] = 300.0
    """How long running responses may go on after a SIGTERM. Then the proxy cuts them."""

    max_connections: Annotated[int, Key(whole_number(1, 10_000_000))] = 20000
    """Most connections of callers at once, on all listeners together; see `Too many connections`_.
    Each connection may need two descriptors: one for the caller and one for the provider. The start
    and each reload raise the process's limit of descriptors to twice this number and 512 more, as
    far as the hard limit (``LimitNOFILE`` of the unit) allows. If the hard limit is too low, the
    log warns."""

    tell_provider: Annotated[bool, Key(BOOLEAN)] = True
    """Whether callers are told which provider a response is from, in ``x-llmproxy-provider``, and
    how many were asked, in ``x-llmproxy-attempts``."""

    tuned_loop: Annotated[bool, Key(BOOLEAN)] = True
    """If Twisted's epoll reactor runs, ``true`` gives it a quicker loop, transports that send at
    once, and TLS straight on the socket. ``false`` keeps Twisted's own parts, in case one of the
    tuned parts has a fault."""

    watch_turns: Annotated[bool, Key(BOOLEAN)] = False
    """Whether the tuned loop times everything that it calls, and names what makes its turns long;
    see `Long turns <operations.rst#long-turns>`_. An event then costs more, so leave it off unless
    you look for something."""

    parent_proxy: Annotated[Url | None, Key(PARENT_PROXY)] = None
    """An ``http://`` URL of a proxy through which providers and the hosts of ``[tunnel]`` are
    reached, such as ``"http://proxy.corp.example:3128"``; see `operations.rst <operations.rst>`_.
    The proxy asks it for a tunnel to the provider (``CONNECT``), for ``https://`` and ``http://``
    providers alike, and it looks up the provider's name. ``HTTPS_PROXY`` and the like are not
    read."""

    parent_proxy_credential: Annotated[Secret | None, Key(USER_AND_PASSWORD)] = None
    """Bare name of a credential file that holds ``NAME:PASSWORD`` in UTF-8 for ``parent_proxy``,
    which gets them as ``Basic`` credentials. The name ends at the first colon."""

    no_parent_proxy: Annotated[tuple[str, ...], Key(DIRECT_HOSTS)] = THIS_MACHINE
    """Hosts that are reached directly and not through ``parent_proxy``: names, ``*.DOMAIN`` for all
    names below a domain, addresses, and networks such as ``10.0.0.0/8``. They are compared with the
    host in a provider's ``url``, or with the host that a tunnel is to lead to. A name is not looked
    up for that, so a network stands only for hosts that are given as addresses. An array of your
    own takes the place of the default, which is this machine."""

    via: Annotated[str, Key(value(token), stated='default ``"llmproxy-HOSTNAME"``')] = "llmproxy"
    """The proxy's pseudonym in the ``Via`` header, a token. If a request already carries the
    pseudonym, the request has come back to the proxy, and the proxy responds with 508. Daemons that
    call one another must not share a pseudonym."""


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """The listener that operators and Prometheus reach."""

    listen: Annotated[str, Key(ENDPOINT)] = "tcp:9080:interface=127.0.0.1"
    """Endpoint of the admin site."""

    hosts: Annotated[tuple[str, ...], Key(HOSTS)] = ()
    """Names by which operators reach the admin site, without a port. A page that shows the
    configuration responds with 421 if the ``Host`` of a request is another name, so that a web page
    of somebody else cannot read it through an operator's browser (DNS rebinding). Addresses, names
    without a dot, ``*.localhost`` and the machine's own name are always accepted. ``/livez``,
    ``/readyz`` and ``/metrics`` accept any name."""

    token: Annotated[Secret | None, Key(CREDENTIAL)] = None
    """Bare name of a credential file. A request that changes something must show what it holds, as
    ``Authorization: Bearer``. Without this key nothing can be changed on the admin site, and such a
    request gets a 403. Reading needs no token."""

    metrics_listen: Annotated[str | None, Key(ENDPOINT)] = None
    """Endpoint that serves only ``/metrics``, ``/livez`` and ``/readyz``, for a Prometheus on
    another host."""


class CredentialFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where credential files are; the reader alone needs it, as structs hold the credentials."""

    directory: Annotated[
        str | None, Key(value(absolute_path), stated="default: ``$CREDENTIALS_DIRECTORY``")
    ] = None
    """Absolute path of the directory that holds the credential files. The directory must be closed
    to others, and to a group that is not one of the process's own. Otherwise the configuration is
    refused. Without this key the files are in ``$CREDENTIALS_DIRECTORY``, which systemd fills at
    the start (``LoadCredential=``). Of that directory only the permissions of others are checked,
    because systemd may open the directory to the service by an access control list."""

    open_to_others: Annotated[bool, Key(BOOLEAN)] = False
    """Whether others may read the directory, as Docker and Kubernetes mount one: everybody may
    enter it, it belongs to root, and its files may be links. Set this key only where the container
    keeps others away. A directory in which others may replace files is refused in any case."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Every deadline, in seconds; ``None`` is off."""

    connect: Annotated[float | None, Key(DURATION_OR_OFF, also_in=_FOR_BOTH)] = 10.0
    """Name lookup, TCP and TLS to the provider together."""

    first_byte: Annotated[float | None, Key(DURATION_OR_OFF, also_in=_FOR_BOTH)] = 600.0
    """From the last byte of the request to the whole head of the response. A provider that does not
    stream a response sends nothing until the response is done."""

    idle: Annotated[float | None, Key(DURATION_OR_OFF, also_in=_FOR_BOTH)] = 300.0
    """Silence of the provider inside a response. While the caller is slow, the clock stands
    still."""

    total: Annotated[float | None, Key(DURATION_OR_OFF, also_in=_FOR_BOTH)] = None
    """The whole request. This deadline also cuts long streams."""

    client_stall: Annotated[float | None, Key(DURATION_OR_OFF, also_in=_FOR_BOTH)] = 60.0
    """How long the caller may take no byte although bytes wait for the caller, also behind the end
    of the response. Kernels take bytes in steps: a caller that reads less than some 200 KB in this
    time may be cut, too."""

    request_head: Annotated[float | None, Key(DURATION_OR_OFF)] = 10.0
    """The head of a request, from its first byte to its last. A TLS handshake before the head has
    the same time again."""

    request_body: Annotated[float | None, Key(DURATION_OR_OFF)] = 60.0
    """The body of a request. Each 64 KiB that came adds one second."""

    client_idle: Annotated[float | None, Key(DURATION_OR_OFF)] = 75.0
    """A caller's connection between two requests."""

    pool_idle: Annotated[float | None, Key(DURATION_OR_OFF, also_in=_FOR_PROVIDERS)] = 60.0
    """A connection to a provider between two requests. If the provider's own ``Keep-Alive`` hint is
    shorter, the hint counts."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much is held or accepted, in bytes; of connections and of drained responses how many."""

    request_head: Annotated[int, Key(SIZE_ABOVE_ZERO)] = 32 * 1024
    """The head of a request. It has at most 128 header fields, whatever this limit is."""

    request_body: Annotated[int, Key(SIZE)] = 32 * 1024**2
    """The body of a request. ``"0"`` refuses every body. A route may set a limit of its own."""

    request_memory: Annotated[int, Key(SIZE)] = 256 * 1024**2
    """All request bodies that are held at once. Beyond this limit the proxy responds to requests
    with 503 and ``retry-after``. One client holds at most four times as much as is left free: four
    fifths where it is alone, a smaller part the more clients want some. If there is no room, the
    unfinished bodies of the client that holds most are refused first, if nothing of them came for a
    second."""

    response_head: Annotated[int, Key(SIZE_ABOVE_ZERO)] = 64 * 1024
    """The head of a provider's response. One header line may be as long as the whole head. The head
    has at most 128 header fields, whatever this limit is."""

    accumulate: Annotated[int, Key(SIZE)] = 1024**2
    """What is kept of the text and the tool calls of one response, on routes with
    ``capture = "content"``. The text is cut on a character boundary; the rest is only counted.
    ``"0"`` keeps nothing."""

    event: Annotated[int, Key(SIZE_ABOVE_ZERO)] = 1024**2
    """The longest event of a stream that the proxy reads for tokens, text and end marker. A longer
    event reaches the caller like any other event, but the record leaves it out and says
    ``overlong``. The same is true of an event of more than 10,000 lines. If a response in one piece
    is longer, its usage is still found if the usage stands at the beginning or the end, as is
    usual; its content is not recorded. The more bytes are allowed, the longer one event can hold up
    all streams: 1 MiB up to some 20 ms."""

    connections_per_address: Annotated[int, Key(whole_number(0, 10_000_000))] = 0
    """Most connections of callers at once from one address; ``0`` is no limit. See
    `Too many connections`_. Callers on a Unix socket have no address, and are not counted. Behind
    ``haproxy:`` the address is that of the PROXY header. There a connection counts from the
    beginning of its first request on, and a rejected connection gets the 503 as the response to
    this request, over TLS too. If the header names no address (``UNKNOWN``), the address is the
    balancer's."""

    drains: Annotated[int, Key(whole_number(0, 1_000_000))] = 100
    """How many detached streams there may be at once: responses that the proxy reads on after their
    clients have left, on routes with ``on_disconnect = "drain"``. ``0`` allows none."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """When a provider that fails is left alone for a while (a circuit breaker); in seconds."""

    failures: Annotated[int, Key(whole_number(0, 1_000_000))] = 5
    """So many failures one after the other open the circuit. ``0`` leaves it closed for ever."""

    window: Annotated[float, Key(DURATION)] = 30.0
    """Only failures of this last while count."""

    open_for: Annotated[float, Key(DURATION)] = 15.0
    """How long the provider is not asked. Then one request is sent to it: if that one succeeds, the
    circuit closes; if it fails, this time begins again. If it has no response after this time,
    another one is sent."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests wait while their provider has no free place."""

    size: Annotated[int, Key(whole_number(1, 1_000_000))] = 200
    """Most requests that wait at once. If the queue is full, a client with fewer waiting requests,
    by its ``weight``, takes the last place of the client with the most."""

    timeout: Annotated[float, Key(DURATION)] = 10.0
    """How long a request waits at most. Then it gets a 503."""


HEALTH = Section.of(Health)
QUEUE = Section.of(Queue)

PROVIDER_TIMEOUTS = Section.part_of(Timeouts, "providers.*.timeouts")
ROUTE_TIMEOUTS = Section.part_of(Timeouts, "routes.timeouts")


class CredentialCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command that prints a provider's credential; ``ttl`` is in seconds."""

    command: Annotated[tuple[str, ...], Key(COMMAND)]
    """The program, by its absolute path, and its arguments. No shell reads them. What the program
    prints on standard output is the credential: one line, by the same rules as a credential file.
    Standard error is not kept, because it may hold secrets."""

    ttl: Annotated[float, Key(TIME_TO_LIVE)] = 300.0
    """How long a printed credential is good. The command runs again after four fifths of it. At
    least ``"1s"``."""


CREDENTIAL_COMMAND = Section.of(CredentialCommand)


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A service that responds, and how it wants to be called.

    ``header`` and the names in ``headers`` are lower-case; ``format`` holds exactly one ``{}``,
    where the credential goes; ``timeouts`` holds only what this provider sets for itself.
    """

    name: str

    url: Annotated[Url, Key(URL)]
    """An ``http://`` or ``https://`` URL with a host. A port and a path are optional. The path is
    put before the path of the request. User, password, query and fragment are refused."""

    dialect: Annotated[Dialect, Key(DIALECT)]
    """The API that the provider speaks. It decides the provider's credential header and the shape
    of the proxy's own errors. Token counts are read by the path of a request, whatever the dialect;
    only at a provider of ``"raw"`` nothing is read."""

    credential: Annotated[
        Secret | CredentialCommand | None,
        Key(credential_or(CredentialCommand, CREDENTIAL_COMMAND)),
    ] = None
    """Bare name of the credential file whose content the proxy sends to the provider; or a table
    with a command that prints the credential, as named below. Without this key the provider gets no
    credential of the proxy."""

    header: Annotated[
        str,
        Key(
            value(header_name),
            stated='default ``"x-api-key"`` for the dialect ``anthropic``, '
            '``"x-goog-api-key"`` for ``gemini``, ``"authorization"`` for all others',
        ),
    ] = "authorization"
    """The header that carries the credential. It may not be a header that the proxy or HTTP's
    framing owns."""

    format: Annotated[
        str,
        Key(
            value(credential_format),
            stated='default ``"{}"`` for the dialects ``anthropic`` and ``gemini``, '
            '``"Bearer {}"`` for all others',
        ),
    ] = "Bearer {}"
    """The value of ``header``. ``{}`` stands for the credential, exactly once. The default follows
    ``dialect`` and not ``header``: ``header = "api-key"`` mostly needs ``format = "{}"`` beside
    it."""

    pass_credential: Annotated[bool, Key(BOOLEAN)] = False
    """Whether the caller's own key is forwarded to the provider, in ``Authorization``,
    ``x-api-key``, ``api-key`` or ``x-goog-api-key``. Callers then show their key for the proxy in
    ``x-llmproxy-key``, or are anonymous. If a client's key for the proxy stands in anything that
    is forwarded, the request is refused. Not together with ``credential``."""

    key_query: Annotated[str | None, Key(KEY_QUERY, stated="default ``false``")] = None
    """The parameter of the query in which callers may send their key for the proxy, as Google's
    clients do: ``true`` is ``key``, a string is another name. The parameter is read and cut out of
    the query; the rest of the query crosses byte for byte. Callers may still use the headers. Not
    together with ``pass_credential``. Without this key, a query in which a client's key stands is
    refused."""

    headers: Annotated[tuple[tuple[str, str], ...], Key(HEADERS)] = ()
    """Headers that the proxy adds to a request if the caller sent none of that name, such as
    ``{ anthropic-version = "2023-06-01" }``. A header that carries a key is refused here, and so is
    a header that the proxy or HTTP's framing owns."""

    drop_headers: Annotated[
        tuple[str, ...], Key(DROPPED, stated="default: the headers named below")
    ] = ROUTING_FIELDS
    """Headers of callers that this provider does not get. An array of your own takes the place of
    the default, so ``[]`` lets all of them cross. A name that spells one of these with ``_`` is
    refused on all routes, unless it stands here, too. What ``headers`` sets is added in any case.
    The default holds headers that servers behind the proxy may take for their own:
    ``true-client-ip``, ``x-real-ip``, ``x-client-ip``, ``x-cluster-client-ip``,
    ``cf-connecting-ip``, ``fastly-client-ip``, ``x-original-url``, ``x-original-uri``,
    ``x-original-host``, ``x-rewrite-url``, ``x-http-method-override``, ``x-http-method`` and
    ``x-method-override``. With ``credential`` it also holds headers that choose the account for
    which the proxy's credential acts: ``openai-organization``, ``openai-project``,
    ``chatgpt-account-id`` and ``x-goog-user-project``."""

    query: Annotated[tuple[tuple[str, str], ...], Key(PARAMETERS)] = ()
    """Parameters that the proxy adds to the query of a request if the caller sent none of that
    name, such as ``{ api-version = "2024-10-21" }``. They stand behind what the caller sent, which
    crosses byte for byte. Write the values as they are: the proxy encodes them. To set a parameter
    whatever the caller says, name it in ``drop_query``, too. A parameter that carries a key is
    refused here."""

    drop_query: Annotated[tuple[str, ...], Key(DROPPED_PARAMETERS)] = ()
    """Parameters of callers' queries that this provider does not get, in whatever case and spelling
    they are written. As they do not cross, a client's key or a model in them does not count; if
    several routes share a path, a model in one counts unless all of them drop it. What ``query``
    sets is added in any case."""

    ca: Annotated[str | None, Key(value(certificates), stated="default: the system's")] = None
    """Absolute path of a PEM file. Its certificates are trusted for this provider, and no
    others."""

    parent_proxy: Annotated[
        Url | str | None, Key(PARENT_PROXY_OR_NONE, stated="default: that of ``[proxy]``")
    ] = None
    """The provider's own parent proxy, in place of that of ``[proxy]``; ``"none"`` reaches the
    provider directly. ``no_parent_proxy`` does not count here, and the credential of ``[proxy]`` is
    not sent."""

    parent_proxy_credential: Annotated[Secret | None, Key(USER_AND_PASSWORD)] = None
    """The credential file for the provider's own ``parent_proxy``, as in ``[proxy]``."""

    pool: Annotated[int, Key(whole_number(0, 1_000_000))] = 1000
    """Most idle connections that are kept."""

    max_streams: Annotated[
        int | None, Key(whole_number(1, 10_000_000), stated="default: no limit")
    ] = None
    """Most requests under way at this provider at once, counted from the moment they are sent until
    the end of their responses, in this process. Another request goes to the next provider of its
    route that has a free place. If there is none, it waits in ``queue``, or gets a 503 where no
    ``queue`` is set."""

    queue: Annotated[Queue | None, Key(inner(Queue, QUEUE), stated="default: none")] = None
    """The queue in which requests wait for one of ``max_streams``, as named below. The clients that
    wait take turns: in the same time, a client of ``weight = 2`` gets two places where another one
    gets one, however many requests either of them has there."""

    health: Annotated[Health, Key(inner(Health, HEALTH), stated="default: as below")] = Health()
    """When the provider is left alone because it fails, as named below. A connection that does not
    come about counts for all clients. What a provider does with a request (a status of 500 or more,
    a 401, a response that breaks off before its head or does not begin in time) counts only for the
    client whose request it was: no client can make a provider look ill to others."""

    timeouts: Annotated[dict[str, float | None], Key(part(PROVIDER_TIMEOUTS))] = {}
    """This provider's own deadlines, as named below."""


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """What a route changes for one of its candidates."""

    model: Annotated[str | None, Key(value(text), stated="default: the caller's")] = None
    """The model that the proxy asks the provider for, in place of the caller's. A request with a
    body must name one, in the body or in the path."""

    weight: Annotated[int, Key(whole_number(1, 1_000_000))] = 1
    """This provider's share of the requests, with ``balance = "weighted"``."""


OVERRIDE = Section.of(Override)


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """From (host, path prefix, model) to candidates; ``hosts`` are lower-case.

    ``hosts`` and ``models`` are ``None`` where the route takes any; ``timeouts`` holds only what
    this route sets for itself, and ``request_body`` is its own limit in bytes.
    """

    path: Annotated[str, Key(value(route_path))]
    """Prefix of the request's path, by whole segments: ``"/openai"`` matches ``/openai/v1`` and not
    ``/openai2``. The path has no trailing slash, except ``"/"`` itself. It has no empty, ``.`` or
    ``..`` segment. ``"/-"``, and all below it, is the proxy's own."""

    name: Annotated[
        str,
        Key(
            value(route_name),
            stated='default: the path without its first slash, ``"root"`` for ``"/"``',
        ),
    ]
    """The route's name in clients' lists, traces and metrics. If two routes have the same path, one
    of them needs this key. If the path does not make a valid name, the route needs this key,
    too."""

    providers: Annotated[tuple[str, ...], Key(PROVIDERS)]
    """The providers that may respond, each once. A request is sent to one of them. If that one
    fails as ``retry_on`` says, the request is sent to the next one, until the client has a byte of
    a response. All of them speak one ``dialect``, and read callers' keys in the same places
    (``pass_credential``, ``key_query``)."""

    balance: Annotated[Balance, Key(word_of(Balance))] = "ordered"
    """Which provider is asked first. ``"ordered"``: the first of the array that is healthy.
    ``"least_busy"``: the one with the fewest requests under way, in this process. ``"weighted"``:
    the providers in turn, each as often as its ``weight`` says. What comes after the first follows
    the same rule."""

    retry_on: Annotated[tuple[str | int, ...], Key(RETRY_ON)] = ("connect", 429, 500, 502, 503, 529)
    """After which failures the next provider is asked. ``"connect"``: no connection came about, or
    it ended before the request was sent whole. A number: a response of that status, from 400 to
    599. ``"reset"``: the connection broke after that, or what came was no HTTP. ``"timeout"``: no
    response within ``first_byte``. In the last two cases the first provider may have done the work,
    and bills it. A 401 or a 403 that refuses the proxy's own credential is passed over in any case.
    If all fail, the client gets the last response that a provider gave. A body that is streamed
    upwards, such as a file, is sent to one provider only, unless nothing of it was sent. ``[]``
    asks no second provider."""

    sticky: Annotated[Sticky, Key(word_of(Sticky))] = "off"
    """Whether requests that belong together go to the same provider, while it is healthy, so that
    its prompt cache is of use. ``"client"``: all requests of one client. ``"session"``: those of
    one client that name the same session (``trace.session_header``); others go as ``balance`` says.
    After a failure they move to another provider, and stay there."""

    sticky_for: Annotated[float, Key(DURATION)] = 3600.0
    """For how long after its last use a provider is remembered. 65,536 sessions are remembered at
    most; the one that was used longest ago is forgotten first."""

    hosts: Annotated[tuple[str, ...] | None, Key(HOSTS, stated="default: any")] = None
    """The route takes only requests to these hosts. Hosts are given without a port, and IPv6
    addresses in brackets."""

    models: Annotated[tuple[str, ...] | None, Key(MODELS, stated="default: any")] = None
    """The route takes only requests that name one of these models, and reads of a list of
    models. Names are looked for in the body, the path and the query; ADR-0016 says where some
    providers take others from."""

    models_list: Annotated[ModelsList, Key(word_of(ModelsList))] = "upstream"
    """Who responds to reads of a list of models: ``"upstream"`` is the provider, ``"configured"``
    the proxy itself; see `Lists of models`_. Not with the dialect ``gemini``."""

    allowed_origins: Annotated[tuple[str, ...], Key(ORIGINS)] = ()
    """Web pages of these origins may call from a browser (CORS), such as ``"https://app.example"``;
    ``"*"`` is any. A preflight gets its response from the proxy, and needs no key. Pages can read
    all headers of a response, and errors of the proxy's own. The provider does not get ``Origin``,
    and what it says of origins itself does not reach the page. Without this key, responses say
    nothing of origins. A page of another site that shows no key gets a 403 in any case, if
    ``anonymous`` would let it call with the provider's credential."""

    websocket: Annotated[bool, Key(BOOLEAN)] = False
    """Whether WebSocket handshakes pass, and then all frames both ways as they are; see
    ``docs/websocket.rst``. Without this key, a handshake gets a 426, on which clients fall back to
    HTTP at once. Not with a ``model`` in ``override``: frames are not changed."""

    strip: Annotated[bool, Key(BOOLEAN)] = True
    """Whether the proxy cuts ``path`` off before it sends the request."""

    override: Annotated[dict[str, Override], Key(by_name(Override, OVERRIDE, candidate))] = {}
    """What is changed for a provider of this route, as named below."""

    timeouts: Annotated[dict[str, float | None], Key(part(ROUTE_TIMEOUTS))] = {}
    """This route's own deadlines, as named below."""

    headers: Annotated[tuple[tuple[str, str], ...], Key(ROUTE_HEADERS)] = ()
    """Headers that the proxy adds on this route, as ``headers`` of the provider does. If both have
    a name, the route's value counts."""

    drop_headers: Annotated[tuple[str, ...], Key(DROPPED)] = ()
    """Headers of callers that do not cross on this route, beside the provider's
    ``drop_headers``."""

    query: Annotated[tuple[tuple[str, str], ...], Key(PARAMETERS)] = ()
    """Parameters that the proxy adds to the query on this route, as ``query`` of the provider does.
    If both have a name, the route's value counts."""

    drop_query: Annotated[tuple[str, ...], Key(DROPPED_PARAMETERS)] = ()
    """Parameters of callers' queries that do not cross on this route, beside the provider's
    ``drop_query``."""

    accept_encoding: Annotated[AcceptEncoding, Key(word_of(AcceptEncoding))] = "identity"
    """Which compression a request for a stream asks the provider for: ``"identity"`` asks for none,
    ``"pass"`` forwards what the caller asked for. Responses in gzip, deflate, brotli and zstd are
    read for their usage."""

    include_usage: Annotated[IncludeUsage, Key(word_of(IncludeUsage))] = "as-asked"
    """Whether a stream of OpenAI's chat completions or completions reports its token counts.
    ``"as-asked"``: if the caller asked for them. ``"inject"``: always, because the proxy puts
    ``"stream_options":{"include_usage":true}`` into the body that it sends. With ``"inject"`` the
    client sees one more event, before ``[DONE]``, with ``usage`` and an empty ``choices``, and sees
    ``"usage":null`` in the other events. A program that takes the first choice of every event
    without looking breaks. All the rest of the body is forwarded byte for byte. If the caller set
    ``include_usage``, to ``false`` too, its value stays. If the option is misshapen or stands
    twice, the body stays as it is. Other endpoints and dialects report their counts anyway, and the
    proxy adds nothing to their requests."""

    on_disconnect: Annotated[OnDisconnect, Key(word_of(OnDisconnect))] = "cancel"
    """What the proxy does with a response if its client leaves. ``"cancel"`` closes the provider's
    connection at once. ``"drain"`` reads the response on, so that the record has the token counts,
    which come last. The proxy reads on for ``drain_for`` at most, and reads at most
    ``limits.drains`` responses on at once; the proxy cancels a response beyond these bounds. A
    response is read on only if the proxy understands its tokens and if the provider has the whole
    request. Meanwhile the provider goes on working, and bills the work. The record's
    ``on_disconnect`` says which of the two happened."""

    drain_for: Annotated[float, Key(DURATION)] = 30.0
    """How long a response is read on after its client left, with ``on_disconnect = "drain"``."""

    error_event: Annotated[bool, Key(BOOLEAN)] = False
    """Whether the proxy ends a broken stream with one error event in the provider's dialect."""

    heartbeat: Annotated[float | None, Key(DURATION_OR_OFF)] = None
    """After how long a silence of the provider the proxy writes a comment into a stream of events,
    and how often from then on; for hops that cut a connection on which nothing comes. It stands
    between two events, and readers drop it. In Anthropic's dialect it is an ``event: ping``, as in
    that API's own streams. Never in NDJSON or JSON, nor in a compressed response, nor in one with a
    ``Content-Length``; nor before the head of the provider's response, for which ``first_byte``
    waits. With ``"off"`` no byte is added."""

    heartbeat_bytes: Annotated[int, Key(FILLER)] = 0
    """How long each of these is at least, line ends included: some hops hold back little pieces."""

    padding: Annotated[int, Key(FILLER)] = 0
    """How long a comment the proxy writes at the start of a stream of events, line ends included;
    for hops that hold back the first so many bytes. In the same responses as ``heartbeat``."""

    capture: Annotated[Capture, Key(word_of(Capture))] = "usage"
    """What the record of a request keeps of the response. ``"usage"`` keeps the tokens.
    ``"content"`` also keeps the text and the tool calls, up to ``limits.accumulate``."""

    request_body: Annotated[int | None, Key(SIZE, stated="default: that of ``[limits]``")] = None
    """The largest body of a request on this route."""


_NO_LIMIT = "default: no limit"


class ClientKey(msgspec.Struct, frozen=True, kw_only=True):
    """A client's key: its 32-byte SHA-256 digest, and its end in seconds since the epoch."""

    hash: Annotated[bytes, Key(DIGEST)]
    """``"sha256:"`` and the 64 lower-case hex digits of the key's SHA-256 digest."""

    expires: Annotated[float | None, Key(INSTANT)] = None
    """When the key expires, with an offset: ``"2027-01-31T00:00:00Z"``, or the same without quotes.
    From then on a request that shows the key gets a 401 ``key_expired``."""


CLIENT_KEY = Section.of(ClientKey)


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """A program that may call; of its ``keys`` ``repr`` shows only how many there are."""

    name: str

    keys: Annotated[
        tuple[ClientKey, ...], Key(strings_or_tables(key_digest, ClientKey, CLIENT_KEY, len))
    ]
    """The keys that the client may show. A key stands in one of five headers: ``Authorization`` (as
    ``Bearer``), ``x-api-key``, ``api-key``, ``x-goog-api-key`` or ``x-llmproxy-key``; an empty one
    counts as no key. Each item is ``"sha256:"`` and the 64 lower-case hex digits of the key's
    SHA-256 digest; or a table with such a ``hash`` and the time when the key ``expires``, as named
    below. ``llmproxy keys new NAME`` prints a new key on its first line, and this line of the file
    on its second. ``llmproxy keys hash`` reads an existing key from standard input, and prints this
    line. No two clients share a key."""

    routes: Annotated[tuple[str, ...], Key(ROUTES)] = ("*",)
    """The names of the routes that the client may use. ``"*"`` is all routes."""

    models: Annotated[tuple[str, ...], Key(MODELS)] = ("*",)
    """The models that the client may ask for. Without ``"*"`` among them, the client's bodies must
    be JSON or forms that name a model."""

    weight: Annotated[int, Key(whole_number(1, 1_000_000))] = 1
    """The client's share of a provider's ``queue``."""
    max_streams: Annotated[int | None, Key(whole_number(1, 1_000_000), stated=_NO_LIMIT)] = None
    """Most requests of the client that are under way at once, whether they stream or not. A
    response that is read on after the client has left counts, too. See `limits.rst
    <limits.rst>`_."""

    requests_per_minute: Annotated[
        int | None, Key(whole_number(1, 10_000_000), stated=_NO_LIMIT)
    ] = None
    """Most requests of the client within any 60 seconds."""

    tokens_per_minute: Annotated[
        int | None, Key(whole_number(1, 1_000_000_000_000), stated=_NO_LIMIT)
    ] = None
    """Most tokens, input and output together, of the requests that the client makes within any 60
    seconds."""

    tokens_per_day: Annotated[
        int | None, Key(whole_number(1, 1_000_000_000_000), stated=_NO_LIMIT)
    ] = None
    """Most tokens, input and output together, of the requests that the client makes on one calendar
    day in UTC. With ``ledger`` or ``postgres`` in ``[trace]``, what was used today is known again
    after a restart."""

    def __repr__(self) -> str:
        return (
            f"Client(name={self.name!r}, keys=<{len(self.keys)}>, "
            f"routes={self.routes!r}, models={self.models!r}, weight={self.weight!r})"
        )


class Intercept(msgspec.Struct, frozen=True, kw_only=True):
    """The hosts whose TLS is ended here, and the authority that signs their certificates."""

    hosts: Annotated[tuple[str, ...], Key(HOST_NAMES)]
    """Hosts whose TLS the proxy ends: exact names, and ``*.DOMAIN`` for all names below a domain.
    Addresses cannot stand here. Each host must be inside the name constraints of
    ``ca_certificate``; a new host outside of them needs a new authority."""

    authority: Annotated[
        Authority, Key(SIGNING_CERTIFICATE, "ca_certificate"), Key(PRIVATE_KEY, "ca_key")
    ]
    """Absolute path of a PEM file: first the certificate that signs, then those that lead to the
    root, without the root. The whole file is sent along in each handshake. ``llmproxy ca new``
    makes one. It is read again at a reload.

    Bare name of a credential file in PEM: the private key of the first certificate of
    ``ca_certificate``, without a passphrase. It is an elliptic key, or an RSA key of 2048 bits or
    more."""

    plain_http: Annotated[bool, Key(BOOLEAN)] = False
    """Whether requests behind a CONNECT to one of the hosts are served without TLS, too, as
    Node's ``fetch`` sends them for ``http://`` URLs. By default they get a 403 that says to use
    ``https://``."""

    handshakes: Annotated[int, Key(whole_number(0, 1_000_000))] = 1000
    """Most connections at once that were intercepted and have not finished TLS; ``0`` is no limit.
    One more is refused with a 503. Those that wait for a new certificate of a host below a wildcard
    are counted apart, up to the same number, so that they do not keep others out."""


class Tunnel(msgspec.Struct, frozen=True, kw_only=True):
    """Where clients may go through the proxy without its looking in."""

    allow: Annotated[tuple[TunnelTarget, ...], Key(TUNNEL_TARGETS)] = ()
    """Where tunnels (``CONNECT``) and plain requests with a whole ``http://`` URL may lead:
    ``HOST:PORT``, ``*.DOMAIN:PORT`` for all names below a domain at any depth (not the domain
    itself), or an address, an IPv6 one in brackets. The port ``*`` is every port. Without this key
    everything is refused. An address that ``allow_private`` is needed for is an error without
    it."""

    allow_private: Annotated[bool, Key(BOOLEAN)] = False
    """Whether tunnels may reach addresses that are not public: loopback, link-local with the
    metadata services of clouds, private, shared and reserved ones; see `sandbox.rst
    <sandbox.rst>`_. It is the address that counts, whatever the name. The proxy's own listeners,
    multicast and the unspecified addresses are never reached."""

    observe: Annotated[bool, Key(BOOLEAN)] = False
    """``true`` lets tunnels pass that ``allow`` would refuse, and marks their records with
    ``would_refuse``, so that you can write the list from what you see. Addresses are checked all
    the same."""

    idle: Annotated[float | None, Key(DURATION_OR_OFF)] = 600.0
    """How long a tunnel may be silent in both directions. Then both connections are reset."""

    total: Annotated[float | None, Key(DURATION_OR_OFF)] = None
    """How long a tunnel may last, silent or not."""

    max_per_client: Annotated[int, Key(whole_number(0, 1_000_000))] = 100
    """Most tunnels of one client at once; ``0`` is no limit. Coding agents open up to 20 at their
    start."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Where the record of each request goes; ``None`` is nowhere.

    ``keep`` is in seconds (``None``: for ever), names in ``session_header`` lower-case.
    """

    jsonl: Annotated[str | None, Key(FILE)] = None
    """Absolute path of a file that gets one line of JSON for each request. SIGUSR2 and SIGHUP
    reopen the file, for logrotate."""

    ledger: Annotated[str | None, Key(FILE)] = None
    """Absolute path of an SQLite file that keeps each request, and the totals of each session.
    ``llmproxy usage`` reads the file. Instances must not share a file: put ``{instance}`` into the
    name."""

    postgres: Annotated[str | None, Key(POSTGRES)] = None
    """A URL of a PostgreSQL server, such as ``"postgresql://llmproxy@db.example/llmproxy"``, or
    libpq's connection string. Its database keeps what ``ledger`` keeps, of every host that names
    it. ``llmproxy usage`` reads it. A password may not stand here. The parameters of libpq may:
    ``?sslmode=verify-full&sslrootcert=FILE`` wants a certificate that is the server's. This key
    needs ``pip install 'llmproxy[postgres]'``."""

    postgres_credential: Annotated[Secret | None, Key(CREDENTIAL)] = None
    """Bare name of the credential file that holds the password for ``postgres``."""

    keep: Annotated[float | None, Key(DURATION_OR_OFF)] = 30 * 86400.0
    """How long ``ledger`` and ``postgres`` keep a request, and how long they keep a session after
    the session's last request. ``"off"`` keeps them for ever. Without one of the two this key is an
    error."""

    otlp: Annotated[Url | None, Key(URL)] = None
    """An ``http://`` or ``https://`` URL of an OpenTelemetry collector, such as
    ``"http://127.0.0.1:4318"``. Each request becomes a span, which the proxy sends in JSON to
    ``/v1/traces`` below this URL. With ``https`` the system must trust the collector's
    certificate."""

    session_header: Annotated[tuple[str, ...], Key(one_or_more(session_header))] = (
        *("x-session-id", "x-claude-code-session-id", "session_id", "session-id"),
    )
    """The headers in which callers name their session: the first one of this array that a request
    has counts. Up to 256 printable characters are recorded. A header may not be one that carries a
    key, nor ``cookie``, nor one that the proxy or HTTP's framing owns. By default: opencode and
    programs of your own send ``x-session-id``, Claude Code ``x-claude-code-session-id``, Codex
    ``session-id``, and older releases of Codex ``session_id``."""


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What several processes and hosts know together; without ``url`` each knows its own."""

    url: Annotated[EngineUrl | None, Key(ENGINE_URL)] = None
    """Redis 7 or newer, or Valkey: ``"redis://HOST:PORT/DATABASE"``, ``"rediss://..."`` for TLS, or
    ``"unix:///PATH"``. All processes with the same engine and ``prefix`` share what a client may
    use: a limit is one figure for all of them. Needs ``pip install 'llmproxy[shared]'``. The engine
    must not evict keys (``maxmemory-policy noeviction``, its default)."""

    user: Annotated[str | None, Key(value(visible))] = None
    """The engine's user (ACL). Without this key it is the engine's default user."""

    credential: Annotated[Secret | None, Key(CREDENTIAL)] = None
    """The name of a credential file with the user's password."""

    ca: Annotated[str | None, Key(value(certificates), stated="default: the system's")] = None
    """A PEM file with the authorities to trust for ``rediss://``, instead of the system's."""

    prefix: Annotated[str, Key(value(visible))] = "llmproxy:"
    """What the engine's keys begin with. Deployments that are to share nothing have different ones.
    With Redis Cluster it must hold a hash tag, as ``"{llmproxy}:"``."""

    timeout: Annotated[float, Key(DURATION)] = 0.05
    """How long a call of the engine may take. A request waits for one call, and before it for the
    rest of another that is under way. Then it is admitted by this process's share of the limit: the
    part that it had of what all used last, and at least an equal part."""

    strict: Annotated[bool, Key(BOOLEAN)] = False
    """Whether a request of a client with limits is refused (503, ``limits_away``) where the engine
    does not answer."""


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """What the log has."""

    access: Annotated[AccessLines, Key(ACCESS)] = True
    """Whether each request that has ended gets a line in the log, the access line. With
    ``"errors"`` only a request whose end reason is not ``complete`` gets one: a request that was
    refused or cut, or whose caller left. A provider's own error status is a complete response, and
    has no line then. This key changes neither the records of ``[trace]`` nor the metrics."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration, checked; ``routes`` stand in the order of the file."""

    proxy: Proxy = Proxy()
    admin: Admin = Admin()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    providers: dict[str, Provider] = {}
    routes: tuple[Route, ...] = ()
    clients: dict[str, Client] = {}
    intercept: Intercept | None = None
    tunnel: Tunnel = Tunnel()
    trace: Trace = Trace()
    shared: Shared = Shared()
    log: Log = Log()

    def timeouts_for(self, route: Route, provider: Provider) -> Timeouts:
        """Return the deadlines of one request: the route's, else the provider's, else ours."""
        return msgspec.structs.replace(self.timeouts, **{**provider.timeouts, **route.timeouts})

    def parent_proxy_for(self, provider: Provider) -> ParentProxy | None:
        """Return the proxy through which ``provider`` is reached, or None: directly."""
        if isinstance(provider.parent_proxy, Url):
            return ParentProxy(provider.parent_proxy, provider.parent_proxy_credential)
        url = self.proxy.parent_proxy
        past_it = provider.parent_proxy is not None  # "none"
        if url is None or past_it:
            return None
        if DirectHosts(self.proxy.no_parent_proxy).match(provider.url.host):
            return None
        return ParentProxy(url, self.proxy.parent_proxy_credential)

    def redacted(self) -> dict[str, object]:
        """Return the effective configuration as JSON-able values, without anything secret.

        Durations and sizes are strings as in the file.  A credential is true or false, keys are
        a count, and of a provider's added headers only the names are shown.
        """
        return {
            "proxy": redacted(self.proxy),
            "admin": redacted(self.admin),
            "timeouts": redacted(self.timeouts),
            "limits": redacted(self.limits),
            "providers": {name: redacted(one) for name, one in self.providers.items()},
            "routes": [{"name": one.name, **redacted(one)} for one in self.routes],
            "clients": {name: redacted(one) for name, one in self.clients.items()},
            "intercept": None if self.intercept is None else redacted(self.intercept),
            "tunnel": redacted(self.tunnel),
            "trace": redacted(self.trace),
            "shared": redacted(self.shared),
            "log": redacted(self.log),
        }


_INLINE = ("key", "api_key", "apikey", "token", "access_token", "secret", "password", "auth")
_WRITE_A_FILE = (
    "no secret stands in this file: write the key into a file of its own in the credentials "
    "directory, and here `credential` with the file's name"
)
_FILES = "no secret stands in this file: each has a file of its own in `directory`"
_MAKE_A_KEY = (
    "no key stands in this file: `llmproxy keys new {}` makes a key and prints its `keys` line"
)

SECTIONS: Mapping[str, Section] = {
    "proxy": Section.of(Proxy),
    "admin": Section.of(Admin),
    "credentials": Section.of(CredentialFiles, instead={"*": _FILES}),
    "timeouts": Section.of(Timeouts),
    "limits": Section.of(Limits),
    "providers.*": Section.of(Provider, instead=dict.fromkeys(_INLINE, _WRITE_A_FILE)),
    "providers.*.credential": CREDENTIAL_COMMAND,
    "providers.*.timeouts": PROVIDER_TIMEOUTS,
    "providers.*.health": HEALTH,
    "providers.*.queue": QUEUE,
    "routes": Section.of(Route),
    "routes.timeouts": ROUTE_TIMEOUTS,
    "routes.override.*": OVERRIDE,
    "clients.*": Section.of(Client, instead=dict.fromkeys(_INLINE, _MAKE_A_KEY)),
    "clients.*.keys": CLIENT_KEY,
    "intercept": Section.of(Intercept),
    "tunnel": Section.of(Tunnel),
    "trace": Section.of(Trace),
    "shared": Section.of(Shared),
    "log": Section.of(Log),
}
"""Every section of the file; ``*`` stands for a name that the operator chooses."""

ROOT = Section(
    names=tuple(dict.fromkeys(path.partition(".")[0] for path in SECTIONS)),
)
"""The file itself, which holds the sections."""
