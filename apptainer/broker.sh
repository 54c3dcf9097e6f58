#!/bin/sh
# A RabbitMQ node as this user, for those who have no broker: data, configuration and log in DIRECTORY.
#   apptainer/broker.sh DIRECTORY                     until SIGTERM
#   apptainer/broker.sh DIRECTORY rabbitmqctl ...     a command for the node that runs there
# Without a rabbitmq.conf in DIRECTORY it listens on loopback alone; docs/hpc.md says what to write. Its
# administrator is keepwarm-admin, with the random password in DIRECTORY/admin.password.
set -eu
if [ $# -eq 0 ]; then
    echo "usage: broker.sh DIRECTORY [COMMAND...]" >&2
    exit 2
fi
umask 077
mkdir -p "$1"
here=$(cd "$1" && pwd)
shift

if [ ! -e "$here/rabbitmq.conf" ]; then
    cat >"$here/rabbitmq.conf" <<CONFIGURATION
listeners.tcp.1     = 127.0.0.1:5672
management.tcp.ip   = 127.0.0.1
management.tcp.port = 15672
# Keepwarm's messages have at most 8 MiB.
max_message_size    = 16777216
CONFIGURATION
fi
# A new node makes this user, and not guest, whose password everybody knows. One that has users already
# makes none.
if [ ! -e "$here/data" ] && ! grep -q '^[[:space:]]*default_user[[:space:]]*=' "$here/rabbitmq.conf"; then
    [ -s "$here/admin.password" ] || od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$here/admin.password"
    chmod 600 "$here/admin.password" "$here/rabbitmq.conf"
    printf '\ndefault_user = keepwarm-admin\ndefault_pass = %s\n' "$(cat "$here/admin.password")" \
        >>"$here/rabbitmq.conf"
fi
[ -e "$here/enabled_plugins" ] || echo '[rabbitmq_management].' >"$here/enabled_plugins"

# The Erlang cookie is made here, not in the user's home.
export HOME="$here" LANG=C.UTF-8
export ERL_EPMD_ADDRESS=127.0.0.1 ERL_EPMD_PORT="${ERL_EPMD_PORT:-4369}"
export RABBITMQ_NODENAME="${RABBITMQ_NODENAME:-keepwarm@localhost}"
export RABBITMQ_DIST_PORT="${RABBITMQ_DIST_PORT:-25672}"
export RABBITMQ_MNESIA_BASE="$here/data" RABBITMQ_LOG_BASE="$here/log"
export RABBITMQ_GENERATED_CONFIG_DIR="$here/generated"
# Each of these files that is not named is looked for in /etc/rabbitmq, which is for the system's broker.
export RABBITMQ_CONFIG_FILE="$here/rabbitmq.conf" RABBITMQ_CONFIG_FILES="$here/conf.d/*.conf"
export RABBITMQ_ADVANCED_CONFIG_FILE="$here/advanced.config" RABBITMQ_CONF_ENV_FILE=/dev/null
export RABBITMQ_ENABLED_PLUGINS_FILE="$here/enabled_plugins" RABBITMQ_PID_FILE="$here/pid"
# The node and rabbitmqctl listen for other nodes on loopback alone.
export ERL_AFLAGS='-kernel inet_dist_use_interface {127,0,0,1}'
# Debian's own commands in the PATH insist on a user called rabbitmq.
programs=/usr/lib/rabbitmq/bin
if [ $# -gt 0 ]; then
    command=$1
    shift
    exec "$programs/$command" "$@"
fi
# The script replaces itself by the node, so that signals reach it.
export RABBITMQ_ALLOW_INPUT=1
export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-noinput
exec "$programs/rabbitmq-server"
