"""One shared egress to language-model providers: it streams, counts, and stays out of the way.

The path of a request
    ``server/site.py`` reads it, ``gateway/gateway.py`` tells its story: ``policy/auth.py`` says who
    calls, ``policy/routes.py`` where the call goes, ``upstream/client.py`` sends it through treq,
    ``stream/relay.py`` hands the response back chunk by chunk, ``stream/tap.py`` reads a copy of it
    on the side, and ``record/trace.py`` and ``record/metrics.py`` remember what happened.

Glossary
    client
        a program that is allowed to call; it has a name and one or more keys
    provider
        a service that answers: a URL, a dialect, a credential, limits
    dialect
        the shape that a provider speaks: ``openai``, ``anthropic``, ``ollama`` or ``raw``
    route
        from (host, path prefix, model) to an ordered list of candidates
    candidate
        one provider, with an optional model override, that a route may use
    relay
        the byte pump for one response
    tap
        the side copy of a response that ``stream/tap.py`` reads
    trace
        the one record of one request, written when it ends
    end reason
        why a request ended; one of a closed set (``errors.EndReason``)
    head
        status line and header fields
"""
