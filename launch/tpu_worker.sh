#!/usr/bin/env bash
# Runs on every worker of a TPU slice; launch/tpu_vm.sh sends it there.
#
#   tpu_worker.sh start SOURCE CONFIGS NFS FLAGS...   installs, and trains in the background
#   tpu_worker.sh state                               running, lost, or the exit status of the run
#   tpu_worker.sh log                                 the last lines of its output
#
# The run survives the connection that started it. Its output is in vqd/run.log.
set -euo pipefail
mkdir -p vqd
cd vqd

running() { [[ -f pid ]] && kill -0 "$(<pid)" 2>/dev/null; }

if [[ "$1" == log ]]; then
  tail -n 30 run.log
  exit
elif [[ "$1" == state ]]; then
  if [[ -f status ]]; then
    cat status
  elif running; then
    echo running
  else
    echo lost
  fi
  exit
fi

source=$2 configs=$3 nfs=$4
shift 4
if running; then
  echo "the run of before goes on" >&2
  exit
fi
for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  python=
done
if [[ -z "$python" ]]; then
  echo "error: vqd_jax needs Python 3.11 or newer, and this image has $(python3 --version); choose" \
    "an image with RUNTIME=, or install one and name it with PYTHON=" >&2
  exit 1
fi
mountpoint -q /mnt/shared || { sudo mkdir -p /mnt/shared && sudo mount -t nfs "$nfs" /mnt/shared; }
gcloud storage cp --recursive "$source" "$configs" .
"$python" -m venv env
env/bin/pip install --quiet "$(basename "$source")[tpu,gcs]"

rm -f status
# The status appears whole: it is written elsewhere first.
# shellcheck disable=SC2016
setsid nohup bash -c '
  code=0
  env/bin/python -m vqd_jax.main --distributed "$@" || code=$?
  echo "$code" > status.new && mv status.new status
' run "$@" >>run.log 2>&1 </dev/null &
echo "$!" >pid
