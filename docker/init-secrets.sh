#!/bin/sh
# Makes the random secrets of docker-compose.yml, once; what exists is kept.
#
#   sudo docker/init-secrets.sh [FOLDER]      (default: docker/secrets)
#
# Compose mounts these files as they are on the host, so their owner counts: root, group 10001 (the
# group of the containers), mode 0640, in a folder that only root and that group may enter.
set -eu

folder=${1:-"$(dirname "$0")/secrets"}
group=10001

if [ "$(id -u)" -ne 0 ]; then
    echo "init-secrets.sh: run it as root, so that the files get the containers' group" >&2
    exit 1
fi

umask 077
mkdir -p "$folder"
chown "0:$group" "$folder"
chmod 0750 "$folder"

# random_hex BYTES
random_hex() {
    od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'
}

# keep NAME: standard input becomes the secret NAME, unless it exists.
keep() {
    if [ -s "$folder/$1" ]; then
        cat >/dev/null
        echo "kept    $folder/$1"
        return
    fi
    cat >"$folder/.$1.draft"
    chown "0:$group" "$folder/.$1.draft"
    chmod 0640 "$folder/.$1.draft"
    mv "$folder/.$1.draft" "$folder/$1"
    echo "created $folder/$1"
}

random_hex 32 | keep database_password
random_hex 32 | keep redis_password
printf 'pcrl_%s_%s' "$(random_hex 6)" "$(random_hex 24)" | keep admin_token

redis_password=$(cat "$folder/redis_password")
printf 'redis://pcrl:%s@redis:6379/0' "$redis_password" | keep broker_url

# The only Redis user: our keys alone, and none of the commands that reconfigure, load code or
# replicate. EVALSHA stays, because kombu's lock releases itself by a script (reliability.md, S10).
digest=$(printf '%s' "$redis_password" | sha256sum | cut -d' ' -f1)
{
    echo "user default off"
    echo "user pcrl on #$digest ~pcrl:* &pcrl:* &/0.* +@all -@admin -@dangerous +info"
} | keep redis_users
