# shellcheck shell=bash
# What all batch scripts begin with: sourced by them, with `root` set to the checkout. Afterwards there are `job` (its id,
# <array>_<task> in an array), the log that everything goes to, and the Python environment.

fail() {
    echo "convoy: $*" >&2
    exit 1
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is for sbatch: see docs/slurm.md"
# sbatch hands on the environment of whoever calls it, who may be a job with an array and restarts of its own.
if own=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "); then
    [[ $own == *" ArrayTaskId="* ]] || unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
    restarts=${own##* Restarts=}
    export SLURM_RESTART_COUNT=${restarts%% *}
fi
# The last element of an array has the array's own number as its job id: requeueing that would rerun every element.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}

# Slurm fails a job without a word if the folder of its log is missing; so the log is opened here instead.
logs=$PWD/logs
mkdir -p "$logs" || exit
if [[ /dev/stdout -ef /dev/null ]]; then # else --output was given to sbatch
    exec >>"$logs/slurm-$job.log" 2>&1
fi

echo "job $job on $(hostname), $(date '+%F %T')"

root=$(cd "$root" && pwd) || exit
container=() # what site.env may put before every command that needs Python
if [[ -f $root/slurm/site.env ]]; then
    # shellcheck source=/dev/null
    source "$root/slurm/site.env" || fail "$root/slurm/site.env failed"
fi
set -u # only now: module systems and activate scripts do not all survive -u
if ((${#container[@]} == 0)); then
    command -v torchrun >/dev/null ||
        fail "no torchrun on PATH: activate the Python environment before sbatch, or in $root/slurm/site.env"
fi

in_container() { "${container[@]}" "$@"; }

# What torch sees is what the ranks will use; CUDA_VISIBLE_DEVICES may name devices that torch cannot.
count_ranks_per_node() {
    if [[ ${CONVOY_RANKS_PER_NODE:-} ]]; then
        echo "$CONVOY_RANKS_PER_NODE"
    else
        in_container python -c '
import os, sys, torch
num_gpus, granted = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
if granted and num_gpus == 0:
    print(f"WARNING: GPUs were granted ({granted}), but torch sees none: training on CPUs", file=sys.stderr)
print(num_gpus or sys.argv[1])' "$SLURM_CPUS_ON_NODE"
    fi
}
