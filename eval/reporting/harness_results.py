"""Results in the shape of lm-evaluation-harness' results_*.json, for tools that read that."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..scoring.arms import LIKELIHOODS
from ..scoring.score import METRICS


def harness_results(
    comparison: Mapping[str, Any], config: Mapping[str, Any], rule: str, es_backend: str
) -> dict[str, Any]:
    """Return results, n-samples, configs, versions and config; one task an arm, each metric with its standard error.

    Standard errors are cluster-robust, by repository; "N/A" where all samples are of one.
    """
    tasks = {_task_name(name): arm for name, arm in comparison["arms"].items()}
    filters = f"{rule}-{es_backend}"
    return {
        "results": {name: {"alias": name} | _metrics(arm, filters) for name, arm in tasks.items()},
        "group_subtasks": {name: [] for name in tasks},
        "configs": {name: _task_config(name, config, rule, es_backend) for name in tasks},
        "versions": dict.fromkeys(tasks, 1),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {name: _directions(arm) for name, arm in tasks.items()},
        "n-samples": {name: {"original": config["num_rows"], "effective": arm["total"]} for name, arm in tasks.items()},
        "config": {
            "model": "titans",
            "model_args": {"pretrained": config["base"], "adapter": config.get("adapter")},
            "batch_size": config["batch_size"],
            "device": config["device"],
            "limit": config["limit"],
            "gen_kwargs": {"temperature": config["temperature"], "max_gen_toks": config["max_new_tokens"]},
            "random_seed": config["seed"],
        },
        "git_hash": config.get("git_commit"),
        "date": time.time(),
        "transformers_version": config.get("versions", {}).get("transformers"),
    }


def _task_name(arm: str) -> str:
    return f"crosscodeeval_{arm.replace('@', '_')}"


def _metrics(arm: Mapping[str, Any], filters: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for measure in (*METRICS, *LIKELIHOODS):
        if measure in arm:
            entry = arm[measure]
            found[f"{measure},{filters}"] = entry["mean"]
            error = entry["standard_error"]
            found[f"{measure}_stderr,{filters}"] = "N/A" if error is None else error
    return found


def _task_config(name: str, config: Mapping[str, Any], rule: str, es_backend: str) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": config["data"],
        "output_type": "generate_until",
        "metadata": {"postprocess": rule, "es_backend": es_backend, "data_sha256": config["data_sha256"]},
    }


def _directions(arm: Mapping[str, Any]) -> dict[str, bool]:
    return {measure: not measure.startswith("nll") for measure in (*METRICS, *LIKELIHOODS) if measure in arm}
