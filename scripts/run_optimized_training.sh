#!/usr/bin/env bash
# From recordings to a report: prepare, train all phases, evaluate, report, on the GPUs there are.
#
#   scripts/run_optimized_training.sh RECORDINGS [CONFIG] [section.key=value …]
#
# RECORDINGS is what `b2t prepare` reads, or a prepared folder; CONFIG a preset or YAML file (a5500x2).
# The same command goes on where a run was stopped. From the environment:
#   PRECISION=fp16|bf16    which DeepSpeed file for GPUs (fp16); DS_CONFIG=FILE names another
#   GPUS=N                 ranks per host (all GPUs of this one; without any, two ranks on its CPU)
#   RUN=DIR, PREPARED=DIR  run folder (runs/CONFIG), prepared data (prepared/RECORDINGS)
#   PREPARE="--window 2"   options of `b2t prepare`
#   HOSTFILE=FILE          several hosts; MASTER=NAME, the first of them, answers the others
#   MASTER_PORT=N          where the first rank answers (29500 with a hostfile, else one that is free)
#   LAUNCHER=deepspeed|torchrun|accelerate    who starts the ranks of one host (deepspeed)
#   BIN=DIR                where b2t and the launchers are (.venv/bin, or what PATH finds)
#   DRY_RUN=1              print the commands that would run
set -euo pipefail

case ${1:-} in
  "" | -h | --help)
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
    [ $# -gt 0 ] && exit 0 || exit 2
    ;;
esac
recordings=$(realpath "$1")
shift
config=a5500x2
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then config=$1 && shift; fi

do_run() {
  printf '+ %s\n' "${*@Q}" >&2
  [ -n "${DRY_RUN:-}" ] || "$@"
}
give_up() {
  echo "run_optimized_training.sh: error: $*" >&2
  exit 2
}

cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
# PATH: launchers start `python`, and DeepSpeed looks for ninja, by name.
[ ! -x "$BIN/b2t" ] || PATH=$(realpath "$BIN"):$PATH
command -v b2t >/dev/null || give_up "no b2t in $BIN or on PATH: run \`make install\`, or set BIN"
run=${RUN:-runs/$(basename "$config" .yaml)}

data=$recordings
if [ ! -f "$recordings/b2t.json" ]; then
  data=${PREPARED:-prepared/$(basename "$recordings")}
  # shellcheck disable=SC2086  # several options in one variable
  [ -f "$data/b2t.json" ] || do_run b2t prepare "$recordings" "$data" ${PREPARE:-}
fi

found=0
[ "${DS_ACCELERATOR:-}" = cpu ] || found=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$found" -gt 0 ]; then
  ranks=${GPUS:-$found}
  ds_config=${DS_CONFIG:-ds_configs/zero2_${PRECISION:-fp16}.json}
else
  ranks=${GPUS:-2}
  ds_config=${DS_CONFIG:-ds_configs/zero2_cpu.json}
  export DS_ACCELERATOR=cpu
  echo "no GPU: $ranks ranks on the CPU, $ds_config" >&2
fi

all=$ranks
launcher=${LAUNCHER:-deepspeed}
case $launcher in
  deepspeed)
    free='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
    [ -n "${HOSTFILE:-}" ] || MASTER_PORT=${MASTER_PORT:-$(python -c "$free")}
    launch=(deepspeed --log_level error --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}")
    if [ -n "${HOSTFILE:-}" ]; then
      [ -r "$HOSTFILE" ] || give_up "HOSTFILE=$HOSTFILE: no such file, or it cannot be read"
      hosts=$(sed 's/#.*//' "$HOSTFILE" | awk 'NF { print $1 }')
      [ -n "$hosts" ] || give_up "HOSTFILE=$HOSTFILE names no host: expected lines like \`node1 slots=2\`"
      all=$((ranks * $(wc -w <<<"$hosts")))
      launch+=(--hostfile "$HOSTFILE" --master_addr "${MASTER:-$(head -n 1 <<<"$hosts")}")
      # ssh gives up a host that answers nothing for 20 s, and the launcher comes back with it.
      export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=4"
    fi
    ;;
  torchrun) launch=(torchrun --standalone --nproc_per_node "$ranks") ;;
  accelerate)
    launch=(accelerate launch --mixed_precision no --dynamo_backend no --num_machines 1)
    launch+=(--num_processes "$ranks")
    # This starts one process per rank, with GPUs or without; --cpu would start one in all.
    [ "$ranks" = 1 ] || launch+=(--multi_gpu)
    ;;
  *) give_up "LAUNCHER=$launcher: expected deepspeed, torchrun or accelerate" ;;
esac
[ -z "${HOSTFILE:-}" ] || [ "$launcher" = deepspeed ] ||
  give_up "HOSTFILE is for LAUNCHER=deepspeed; docs/SCALING.md starts $launcher on several hosts"

settings=("data.path=$data" "run.dir=$run" "$@")
do_run b2t doctor --deepspeed_config "$ds_config" --config "$config" --ranks "$all" "${settings[@]}"
do_run "${launch[@]}" train_ds.py --deepspeed_config "$ds_config" --config "$config" "${settings[@]}"
do_run b2t evaluate "$run"
do_run b2t report "$run"
