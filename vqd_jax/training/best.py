"""The best model of a run so far: a model folder ``WORKDIR/best`` beside the checkpoints."""

from pathlib import Path

from absl import logging

from vqd_jax import files
from vqd_jax.options import BEST_METRICS
from vqd_jax.pipeline import VQDiffusion


def keep(
    workdir: str, metric: str, step: int, values: dict[str, float], pipeline: VQDiffusion
) -> None:
    """Writes ``best`` and ``best.json``, if no model of an earlier step has a better figure.

    Args:
      workdir: of the run.
      metric: a key of ``BEST_METRICS``, which says whether more is better.
      step: steps taken.
      values: what was measured.
      pipeline: with the averaged parameters.
    """
    path = Path(workdir) / "best.json"
    value, sign = values[metric], 1 if BEST_METRICS[metric] else -1
    if path.exists():
        told = files.read_json(path, "remove it")
        # After a return to an earlier checkpoint, later steps are done again.
        earlier = told.get("metric") == metric and told["step"] < step
        if earlier and sign * told["value"] >= sign * value:
            return
    pipeline.save_pretrained(str(Path(workdir) / "best"))
    files.write_json(path, {"step": step, "metric": metric, "value": value})
    logging.info("the best model so far is of step %d: %s=%.5g", step, metric, value)
