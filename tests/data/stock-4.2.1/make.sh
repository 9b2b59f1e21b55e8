#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Makes the golden images anew: tests/data/stock-4.2.1/make.sh CRIU
# CRIU is stock criu 4.2.1. Needs root, gcc and nft; all happens in network namespaces of its own.
set -eu
criu=$(realpath "$1")
here=$(dirname "$(realpath "$0")")

if [ $# -eq 1 ]; then
    exec 9< /proc/self/ns/net
    for set in inside outside; do
        unshare --net "$0" "$criu" "$set"
    done
    exit
fi

case $2 in
inside) # criu in the server's namespace: the namespace is not dumped
    set -- "$criu" dump --network-lock skip
    set=inside
    ;;
outside) # criu outside: the namespace is dumped, and the lock's table with it
    set -- nsenter --net=/proc/self/fd/9 "$criu" dump --network-lock nftables
    set=outside
    ;;
esac

work=$(mktemp -d)
server=
trap 'exec 3<&-; [ -z "$server" ] || kill -KILL "$server" 2> /dev/null || :; rm -rf "$work"' EXIT

ip link set lo up
gcc -O2 -Wall -o "$work/server" "$here/server.c"
mkfifo "$work/pid"
"$work/server" > "$work/pid" 9<&- &
exec 3< "$work/pid"
read -r server <&3

mkdir "$work/$set"
"$@" --tree "$server" --images-dir "$work/$set" --tcp-established --log-file dump.log || {
    grep -B5 Error "$work/$set/dump.log" >&2
    exit 1
}
server=
wait

rm -rf "${here:?}/$set"
mkdir "$here/$set"
cd "$work/$set"
for image in inventory pstree files sk-queues ids-* fdinfo-* core-* tcp-stream-* nftables-*; do
    image=${image%.img}.img
    [ ! -e "$image" ] || install -m 644 "$image" "$here/$set/"
done
