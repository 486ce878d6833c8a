#!/usr/bin/env bash
# Runs on a slice of Cloud TPU VMs: asks for it, waits, installs, and trains on all its workers. The
# run goes on when the connection breaks or this script ends. Run the script again to follow it:
# what exists is not made anew.
#
#   PROJECT=my-project ZONE=us-west4-a TPU=v5litepod-16 NAME=coco BUCKET=gs://my-bucket \
#     NFS=10.0.0.2:/share launch/tpu_vm.sh --config=configs/coco.py --workdir=/mnt/shared/coco \
#     --config.data.dir=/mnt/shared/data/coco \
#     --config.autoencoder.path=/mnt/shared/models/openimages_f8 \
#     --config.text_encoder.path=/mnt/shared/models/clip_b32 --config.mesh.fsdp=16
#
# The workdir must be on storage that all workers share, such as a Filestore. The batch must divide
# over the chips; see docs/scaling.md.
#
# NAME          of the slice and of the request for it
# TPU           accelerator type, such as v5litepod-16, v5p-128 or v6e-64
# RUNTIME       image of the VMs; by default the usual one of TPU
# PYTHON        Python of the workers, 3.11 or newer; by default the newest one of the image
# SPOT=1        a cheaper slice that may be taken away; it is asked for again, and the run goes on
# RESTARTS      how often a run that was cut off is started again (100)
# NFS           HOST:/SHARE that every worker mounts at /mnt/shared
# SOURCE        what pip installs on every worker; by default a wheel of this repository, in BUCKET
# DELETE=1      gives the slice back after a run that ended well
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PROJECT:?name the Google Cloud project}" "${ZONE:?such as us-west4-a}"
: "${TPU:?such as v5litepod-16}" "${NAME:?of the slice}" "${BUCKET:?gs://... for the wheel}"
: "${NFS:?HOST:/SHARE for the workdir}"

case "$TPU" in
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  *) image=v2-alpha-tpuv5-lite ;;
esac
where=(--project="$PROJECT" --zone="$ZONE")
request() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }
state_of_request() { request describe "$NAME" --format='value(state.state)'; }
# on_workers all|NUMBER ARGUMENTS... runs tpu_worker.sh there; %q quotes for the shell of the worker.
on_workers() {
  local worker=$1 command
  shift
  command=$(printf '%q ' env PYTHON="${PYTHON:-}" bash -c "$(<launch/tpu_worker.sh)" worker "$@")
  gcloud compute tpus tpu-vm ssh "$NAME" --worker="$worker" --command="$command" "${where[@]}"
}

ask_and_wait() {
  local state spot=()
  [[ "${SPOT:-0}" == 1 ]] && spot=(--spot)
  while :; do
    if ! request describe "$NAME" >/dev/null 2>&1; then
      request create "$NAME" --node-id="$NAME" --accelerator-type="$TPU" \
        --runtime-version="${RUNTIME:-$image}" "${spot[@]}"
    fi
    state=$(state_of_request) || state="not known"
    case "$state" in
      ACTIVE) return ;;
      SUSPENDED)
        # A spot slice that was taken away does not come back; another one has to be asked for.
        if [[ "${SPOT:-0}" == 1 ]]; then
          request delete "$NAME" --force --quiet
          continue
        fi
        ;;&
      FAILED | SUSPENDED)
        echo "error: the request for $NAME is $state; delete it and ask again" >&2
        exit 1
        ;;
    esac
    echo "$NAME is $state; asking again in ${POLL:-30} s" >&2
    sleep "${POLL:-30}"
  done
}

# Prints how the run ended: its exit status, lost (it was killed) or gone (the slice was taken).
follow() {
  local state
  while :; do
    # A connection that fails says nothing of the run.
    state=$(on_workers 0 state 2>/dev/null | tail -n 1) || state=
    if [[ -n "$state" && "$state" != running ]]; then
      echo "$state"
      return
    fi
    if [[ "$(state_of_request || echo ACTIVE)" != ACTIVE ]]; then
      echo gone
      return
    fi
    sleep "${POLL:-30}"
  done
}

if [[ -z "${SOURCE:-}" ]]; then
  rm -rf build/wheel
  python -m pip wheel --quiet --no-deps --wheel-dir=build/wheel .
  gcloud storage cp build/wheel/*.whl "$BUCKET/wheels/"
  gcloud storage cp --recursive configs "$BUCKET/wheels/"
  SOURCE="$BUCKET/wheels/$(basename build/wheel/*.whl)"
fi

for ((i = 0; i <= ${RESTARTS:-100}; i++)); do
  ask_and_wait
  on_workers all start "$SOURCE" "$BUCKET/wheels/configs" "$NFS" "$@"
  status=$(follow)
  case "$status" in
    0)
      [[ "${DELETE:-0}" == 1 ]] && request delete "$NAME" --force --quiet
      exit 0
      ;;
    # An error of the user, which would come again.
    1)
      on_workers 0 log >&2 || true
      echo "error: the run ended with an error; vqd/run.log on the workers has all of it" >&2
      exit 1
      ;;
  esac
  echo "the run was cut off ($status); starting it again" >&2
done
echo "error: the run was cut off too often" >&2
exit 1
