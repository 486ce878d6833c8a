#!/usr/bin/env bash
# Runs on this machine: one process for all its devices, or several for a rehearsal of a cluster.
#
#   launch/local.sh --config=configs/emoji.py --workdir=runs/emoji
#   PROCESSES=2 DEVICES=4 launch/local.sh --config=configs/tiny.py --workdir=runs/two
#
# PROCESSES: how many (1); several find each other on a port of this machine, as on a cluster.
# DEVICES: virtual CPU devices of each process; unset uses the devices that are there.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -n "${DEVICES:-}" ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi
processes="${PROCESSES:-1}"
if [[ "$processes" == 1 ]]; then
  exec python -m vqd_jax.main "$@"
fi

export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-12355}" JAX_NUM_PROCESSES="$processes"
pids=()
# A signal to this script reaches all processes, so that they save and stop together.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID="$i" python -m vqd_jax.main --distributed "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  # The signal may have interrupted the wait alone (a status above 128): the process goes on.
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  [[ "$code" == 0 ]] || status="$code"
done
exit "$status"
