#!/bin/sh
# PostgreSQL's to_regclass() does not see a table that another session has committed meanwhile.
#
# Packages: psycopg 3.3.9; the PostgreSQL server that is installed (seen with Debian 12's 15.18).
#
# A transaction asks whether a table exists, waits for an advisory lock, and asks again.  Meanwhile the
# session that had the lock has made the table and committed.  At READ COMMITTED the second question sees
# that commit, if it is a query of pg_class.  to_regclass() looks into the session's cache of the catalog,
# which remembers that there was no such table.  The cache is brought up to date when a transaction begins
# and when a table is locked; an advisory lock does not do that.
#
# So "take the lock, and make the tables unless to_regclass() finds them" fails with "already exists" where
# two programs start at once.  llmproxy asks pg_class.
#
# Seen:
#     before the lock: no table
#     behind the lock: to_regclass() sees no table, pg_class has 1
set -eu
folder=$(mktemp -d)
server=
finish() {
    test -z "$server" || { kill -INT "$server"; wait "$server" || true; }
    rm -rf "$folder"
}
trap finish EXIT
bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -n 1)
test -n "$bin" || bin=$(dirname "$(command -v initdb || echo ./initdb)")
test -x "$bin/initdb" || { echo "no PostgreSQL server here: apt-get install postgresql"; exit 1; }
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'psycopg[binary]==3.3.9' \
    2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
as=
if [ "$(id -u)" = 0 ]; then
    as="setpriv --reuid=nobody --regid=nogroup --clear-groups"
    chown nobody "$folder"
fi
cd "$folder"
$as "$bin/initdb" --no-sync --username=postgres --auth=trust --pgdata=data >initdb 2>&1 || { cat initdb; exit 1; }
$as "$bin/postgres" -D data -k "$folder" -c listen_addresses= -c fsync=off >log 2>&1 &
server=$!
cat > run.py <<'PYTHON'
import sys, threading, time

import psycopg


def connect():
    for _ in range(200):
        try:
            return psycopg.connect(f"host={sys.argv[1]} user=postgres", autocommit=True)
        except psycopg.OperationalError:
            time.sleep(0.05)
    sys.exit("the server does not start")


def one(connection, query):
    return connection.execute(query).fetchone()[0]


maker, waiter = connect(), connect()
maker.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
waiter.execute("BEGIN")
before = one(waiter, "SELECT to_regclass('made')")
print("before the lock:", "no table" if before is None else before)
lock = threading.Thread(target=waiter.execute, args=("SELECT pg_advisory_xact_lock(1)",))
lock.start()
while not one(maker, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
    time.sleep(0.01)
maker.execute("CREATE TABLE made (x integer); COMMIT")
lock.join()
seen = one(waiter, "SELECT to_regclass('made')")
rows = one(waiter, "SELECT count(*) FROM pg_class WHERE relname = 'made'")
print(f"behind the lock: to_regclass() sees {'no table' if seen is None else seen}, pg_class has {rows}")
if (before, seen, rows) != (None, None, 1):
    sys.exit("this release does something else")
PYTHON
"$folder/venv/bin/python" run.py "$folder"
