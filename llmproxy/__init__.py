"""One shared egress to language-model providers: it streams, counts, and stays out of the way.

The path of a request
    ``server/connection.py`` reads it, and ``gateway/gateway.py`` tells its story:
    ``policy/auth.py`` finds the client, ``policy/routes.py`` the route and its candidates,
    ``policy/limits.py`` leases what it needs of its client's limits, ``gateway/attempt.py`` sends
    it through treq, ``stream/relay.py`` forwards the response chunk by chunk, ``stream/tap.py``
    reads a copy of it, and ``gateway/recorder.py`` writes down what happened.
    ``docs/architecture.rst`` draws all of it.

Glossary
    client
        a program that is allowed to call; it has a name and one or more keys
    provider
        a service that responds: a URL, a dialect, a credential, limits
    dialect
        the shape that a provider speaks: ``openai``, ``anthropic``, ``ollama`` or ``raw``
    endpoint
        one operation of an API, known by its path; a row of the table in ``dialects/endpoints.py``
    route
        from (host, path prefix, model) to an ordered list of candidates
    candidate
        one provider, with an optional model override, that a route may use
    lease
        what one request holds of its client's limits, until it ends
    attempt
        one request sent to one candidate
    relay
        the byte pump for one response
    tap
        the reader of a copy of a response, beside the relay
    detached stream
        a response that is read on after its client left, for its token counts
    drain
        the shutdown of the process: new work is refused, running responses go on
    trace
        the one record of one request, written when it ends
    end reason
        why a request ended; one of a closed set (``errors.EndReason``)
    head
        status line and header fields
"""
