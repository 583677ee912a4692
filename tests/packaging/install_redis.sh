#!/bin/sh
# Installs redis-server, which the tests of the Redis tier start, where it is missing: Debian's package, as root or with
# sudo. Where that cannot be, one line says what to do; everything else works without.
set -eu
command -v redis-server >/dev/null && exit 0
if [ "$(id -u)" = 0 ]; then as_root=""; else as_root="sudo -n"; fi
if command -v apt-get >/dev/null && $as_root true 2>/dev/null &&
    $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y redis-server >/dev/null
then
    exit 0
fi
echo "redis-server is missing and the tests of the Redis tier need it: install it, on Debian with" \
    "'sudo apt-get install redis-server'" >&2
