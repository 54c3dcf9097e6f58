#!/bin/sh
# As the entry point of the image postgres: a database in PGDATA at the first start, for any user.
set -eu
password=$(cat "$POSTGRES_PASSWORD_FILE")
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    mkdir -p "$PGDATA"
    chmod 700 "$PGDATA"
    umask 077
    printf '%s\n' "$password" >/tmp/password
    # initdb wants a name for its user, and the container's has none.
    printf 'postgres:x:%s:%s::/:/bin/sh\n' "$(id -u)" "$(id -g)" >/tmp/passwd
    LD_PRELOAD=libnss_wrapper.so NSS_WRAPPER_PASSWD=/tmp/passwd NSS_WRAPPER_GROUP=/dev/null \
        initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust "$POSTGRES_INITDB_ARGS"
    rm /tmp/password
    printf 'host all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
    pg_ctl -w start -o "-c listen_addresses=''" >/dev/null
    createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
    pg_ctl -w stop >/dev/null
fi
exec "$@" -c listen_addresses='*'
