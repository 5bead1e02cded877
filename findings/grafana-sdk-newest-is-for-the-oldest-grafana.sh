#!/bin/sh
# Asked for Grafana 11 or newer, pip installs grafana-foundation-sdk for Grafana 10.1.
#
# Package: grafana-foundation-sdk, builds of up to 1769699998!10.1.0 (pip 24 and newer).
#
# The project builds its SDK for each Grafana from 10.1 to 11.6 in one go, newest first, and puts the
# second of the build into the version's epoch (PEP 440): 1769699379!11.6.0 ... 1769699998!10.1.0.  An
# epoch counts before all else, so that the "newest" version is the one for the oldest Grafana, and it
# is above any number without an epoch: ">=11" lets it in.  A range has to name the epoch, or the
# version is pinned.
#
# Seen (what pip would install):
#     grafana-foundation-sdk                     10.1.0
#     grafana-foundation-sdk>=11                 10.1.0
#     grafana-foundation-sdk~=1769699379!11.6.0  11.6.0
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Builds that came later are left out, so that these lines stay true.
echo 'grafana-foundation-sdk<=1769699998!10.1.0' > "$folder/until"
for wanted in 'grafana-foundation-sdk' 'grafana-foundation-sdk>=11' 'grafana-foundation-sdk~=1769699379!11.6.0'; do
    "$folder/venv/bin/pip" install -q --disable-pip-version-check --dry-run --no-deps --ignore-installed \
        --report "$folder/report" -c "$folder/until" "$wanted" 2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
    version=$("$folder/venv/bin/python" -c 'import json, sys
print(json.load(open(sys.argv[1]))["install"][0]["metadata"]["version"].partition("!")[2])' "$folder/report")
    printf '%-42s %s\n' "$wanted" "$version"
done | tee "$folder/out"
sed -n 's/^#     \(grafana-foundation-sdk.*\)/\1/p' "$0" | cmp - "$folder/out"
