#!/usr/bin/env bash
# Runs on a slice of Cloud TPU VMs: asks for it, waits, installs, and starts the same command on all
# its workers. Running it again goes on where it was: what exists is not made anew.
#
#   PROJECT=my-project ZONE=us-west4-a TPU=v5litepod-256 NAME=coco BUCKET=gs://my-bucket \
#     NFS=10.0.0.2:/share launch/tpu_vm.sh --config=configs/coco.py --workdir=/mnt/shared/coco \
#     --config.mesh.fsdp=16
#
# The workdir must be on storage that all workers share, such as a Filestore.
#
# NAME          of the slice and of the request for it
# TPU           accelerator type, such as v5litepod-16, v5p-128 or v6e-64
# RUNTIME       image of the VMs (the one of TPU)
# SPOT=1        a cheaper slice that may be taken away; the run saves when it is, and goes on
# NFS           HOST:/SHARE that every worker mounts at /mnt/shared
# SOURCE        what pip installs on every worker (a wheel of this repository, in BUCKET)
# DELETE=1      gives the slice back afterwards
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
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --worker=all --command="$1" "${where[@]}"; }

if ! request describe "$NAME" >/dev/null 2>&1; then
  spot=()
  [[ "${SPOT:-0}" == 1 ]] && spot=(--spot)
  request create "$NAME" --node-id="$NAME" --accelerator-type="$TPU" \
    --runtime-version="${RUNTIME:-$image}" "${spot[@]}"
fi
until state=$(request describe "$NAME" --format='value(state.state)') && [[ "$state" == ACTIVE ]]; do
  case "$state" in
    FAILED | SUSPENDED)
      echo "error: the request for $NAME is $state; delete it and ask again" >&2
      exit 1
      ;;
  esac
  echo "$NAME is $state; asking again in ${POLL:-30} s" >&2
  sleep "${POLL:-30}"
done

if [[ -z "${SOURCE:-}" ]]; then
  rm -rf build/wheel
  python -m pip wheel --quiet --no-deps --wheel-dir=build/wheel .
  gcloud storage cp build/wheel/*.whl "$BUCKET/wheels/"
  gcloud storage cp --recursive configs "$BUCKET/wheels/"
  SOURCE="$BUCKET/wheels/$(basename build/wheel/*.whl)"
fi
on_all "mountpoint -q /mnt/shared || { sudo mkdir -p /mnt/shared &&
  sudo mount -t nfs $NFS /mnt/shared; }"
on_all "mkdir -p vqd && gcloud storage cp --recursive $SOURCE $BUCKET/wheels/configs vqd/ &&
  python3 -m venv vqd/env && vqd/env/bin/pip install --quiet \"vqd/$(basename "$SOURCE")[tpu,gcs]\""

# Arguments are quoted once more for the shells of the workers.
on_all "cd vqd && env/bin/python -m vqd_jax.main --distributed $(printf '%q ' "$@")"
[[ "${DELETE:-0}" == 1 ]] && request delete "$NAME" --force --quiet
exit 0
