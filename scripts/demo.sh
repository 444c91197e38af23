#!/usr/bin/env bash
# The whole job on simulated recordings: simulate, prepare, train, evaluate.
# PRECISION=bf16 trains in bf16 on GPUs that have it.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
RUN=${RUN:-runs/demo}
DATA=data/demo

if [ ! -f "$DATA/prepared/b2t.json" ]; then
  "$BIN/b2t" simulate "$DATA/simulated" --force \
    --electrodes 64 --select-from 256 --trials 2000 200 200
  "$BIN/b2t" prepare "$DATA/simulated" "$DATA/prepared"
fi

gpus=$("$BIN/python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  ranks=$gpus
  ds_config=ds_configs/zero2_${PRECISION:-fp16}.json
else
  ranks=2
  ds_config=ds_configs/zero2_cpu.json
  export DS_ACCELERATOR=cpu
fi

# A port that is free: the launcher's own would be taken where two demos run on one machine.
free='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
port=$("$BIN/python" -c "$free")
# PATH: the launcher starts `python` and looks for ninja there.
PATH="$PWD/$BIN:$PATH" "$BIN/deepspeed" --log_level error --num_accelerators "$ranks" \
  --master_port "$port" train_ds.py --deepspeed_config "$ds_config" --config demo \
  "run.dir=$RUN" "data.path=$DATA/prepared"

"$BIN/b2t" evaluate "$RUN"
"$BIN/b2t" report "$RUN"
