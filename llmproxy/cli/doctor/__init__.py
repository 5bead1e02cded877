"""``llmproxy doctor``: what holds a stream back, what cuts it, and which line changes that.

``doctor URL...`` asks the hops themselves.  A run goes from the command line to the last line of
the report like this:

    ``command.py``
        the arguments, the progress on a terminal, the exit code
    ``target.py``
        a URL, and the request that is sent to it: a paced stream of our own, a call of a dialect,
        or just the URL
    ``exchange.py``
        one request over a socket of its own, and when each byte of its response came
    ``examination.py``
        all that is tried with one URL, one exchange after the other
    ``shape.py``
        from arrival times to a word: streams, held, in blocks, late (ADR-0034)
    ``verdict.py``
        from what was seen at one URL to findings, and from those of several URLs to the guilty hop
    ``hops.py``
        which programs a response's head tells of
    ``advice.py``
        the line to change, for a program and a finding
    ``diagnosis.py``
        all of that in one call, for programs and tests: nothing is printed
    ``report.py``
        the table, the plot and the JSON

``examination`` and ``exchange`` touch sockets and the clock.  ``shape``, ``verdict``, ``hops`` and
``advice`` are functions of what was seen, and ``report`` prints.

``doctor timeouts`` (``timeouts.py``, ``fingerprint.py``) asks nobody: it reads the ledger.
``doctor trust`` (``trust.py``) lets the programs of a sandbox ask.
"""
