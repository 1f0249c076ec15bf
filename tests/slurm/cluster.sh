#!/bin/bash
# A Slurm cluster in namespaces of its own: mounts, processes, host names. Started by cluster.py, which wrote its files:
#
#   cluster.sh FOLDER NETWORK NODE...       NETWORK: shared, or separate (then called in a network namespace of its own)
#
# Answers with a line, an exit code, once munged and slurmctld have started. Then each line of stdin is a function of
# this file and a node, and is answered likewise. It ends with stdin, also when who held the other end was killed; the
# kernel then ends all that runs on the cluster, and FOLDER is removed.
folder=$1 network=$2 nodes=("${@:3}")

if (($$ != 1)); then # not in the namespaces yet
    unshare --mount --uts --pid --fork --kill-child --mount-proc bash "$0" "$@"
    code=$?
    rm -rf -- "$folder"
    exit "$code"
fi

start_controller() {
    hostname controller &&
        mount --bind "$folder/hosts" /etc/hosts &&
        mount --bind "$folder/etc" /etc/slurm && # for jobs that were submitted without the environment
        connect_nodes &&
        munged --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munge.pid" \
            --seed-file="$folder/munge.seed" --log-file="$folder/log/munged.log" &&
        slurmctld
}

# A bridge, at which the controller is, and for each node a network with one cable to it. The bridge's end of the cable
# bears the node's name.
connect_nodes() {
    [[ $network == separate ]] || return 0
    ip link set lo up && ip link add bridge type bridge && ip link set bridge up &&
        ip address add "$(address_of controller)/24" dev bridge || return
    local node
    for node in "${nodes[@]}"; do
        local namespace=$folder/networks/$node
        touch "$namespace" && unshare --net="$namespace" ip link set lo up &&
            ip link add "$node" type veth peer name eth0 netns "$namespace" &&
            ip link set "$node" master bridge up &&
            nsenter --net="$namespace" ip address add "$(address_of "$node")/24" dev eth0 &&
            nsenter --net="$namespace" ip link set eth0 up || return
    done
}

address_of() { awk -v name="$1" '$2 == name { print $1; exit }' /etc/hosts; }

# A node's processes have a namespace of their own, so that they end all at once with its first one. That one is bash,
# which reaps what slurmd leaves behind; it would become its last command if that were not followed by another.
declare -A launchers
power_on() {
    local enter=()
    [[ $network == shared ]] || { heal "$1" && enter=(nsenter --net="$folder/networks/$1"); }
    # shellcheck disable=SC2016 # $0 is for the inner bash
    "${enter[@]}" unshare --uts --pid --fork --kill-child --mount-proc bash -c '
        hostname "$0"
        slurmd -N "$0" && sleep infinity
        exit' "$1" </dev/null >&2 &
    launchers[$1]=$!
}

# With a network of its own a node goes without a goodbye, as at a loss of power; else its connections are closed.
power_off() {
    [[ $network == shared ]] || cut "$1"
    local launcher=${launchers[$1]} first
    read -r first <"/proc/$launcher/task/$launcher/children" || [[ $first ]] || return
    kill -KILL "$first"
    wait "$launcher" 2>/dev/null # which ends when all of the node's processes have
    return 0
}

cut() { ip link set "$1" down; }
heal() { ip link set "$1" up; }

export SLURM_CONF=$folder/etc/slurm.conf
start_controller </dev/null >&2
echo $?
while read -r action node; do
    "$action" "$node" </dev/null >&2
    echo $?
done
