"""The training loop: optimizer steps, metrics, evaluation, and the end of a run. It prints nothing; a Reporter does."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from titans_ds.errors import OutputError, TrainingError
from titans_ds.memory import Pass
from titans_ds.training import ranks
from titans_ds.training.build import gate_names, save_trained
from titans_ds.training.checkpoints.checkpoint import Checkpoints, Found
from titans_ds.training.checkpoints.files import Progress
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.engine import Engine
from titans_ds.training.evaluation import Evaluation, Evaluator
from titans_ds.training.metrics import MetricsWriter, gradient_norms, memory_stats, peak_host_bytes, peak_memory_bytes
from titans_ds.training.optimizer import lr_at
from titans_ds.training.run_folder import RunFolder
from titans_ds.training.settings import TrainConfig
from titans_ds.training.step import Carried, Passes, commit, run_passes
from titans_ds.zero.heartbeat import on_loss

logger = logging.getLogger("titans_ds")
_BEFORE = "evaluation/before.json"


class Reporter(Protocol):
    """Shows a run to whoever started it; called on rank 0."""

    def step(self, step: int, values: dict[str, Any]) -> None:
        """After every optimizer step."""

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """After every evaluation."""


@dataclass(frozen=True)
class Verdict:
    """What the ranks found together after the passes of a step."""

    loss: float
    finite_loss: bool
    finite_state: bool
    stop: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last evaluation, and whether SIGTERM or RUN/stop stopped it early."""

    evaluation: Evaluation | None
    stopped: bool


class Trainer:
    """Runs a configuration on an engine.

    Args:
        config: of the run.
        engine: runs the module; decides about ranks.
        lanes: training data of this rank.
        evaluator: None for a run without evaluation.
        folder: of the run, on rank 0; None elsewhere.
        reporter: shows progress, on rank 0; None elsewhere.
        tokenizer: saved beside a trained base model.
        checkpoints: where the run is saved, on every rank; None for a run without checkpoints.
        found: the checkpoint that it goes on from, which the engine has loaded; None from the beginning.
        carried: the states of this rank's lanes in it.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        lanes: Lanes,
        evaluator: Evaluator | None = None,
        folder: RunFolder | None = None,
        reporter: Reporter | None = None,
        tokenizer: Any | None = None,
        checkpoints: Checkpoints | None = None,
        found: Found | None = None,
        carried: Carried | None = None,
    ) -> None:
        self.config, self.engine, self.lanes, self.evaluator = config, engine, lanes, evaluator
        self.folder, self.reporter, self.tokenizer = folder, reporter, tokenizer
        self.progress = Progress(**found.marker["progress"]) if found else Progress()
        self.carried, self.checkpoints = carried or Carried(), checkpoints
        self._gates, self._resumed = gate_names(engine.module), found is not None
        resumed = found.step if found else None
        self._metrics = MetricsWriter(folder.path, config.run, resumed) if folder else None
        self._stop, self._unsaved = False, ""

    def run(self) -> Outcome:
        """Train to the end, or to SIGTERM or a file RUN/stop; evaluate at intervals; save.

        Raises:
            TrainingError: losses stayed non-finite for training.nonfinite_limit steps.
        """
        before = signal.signal(signal.SIGTERM, self._on_signal)
        on_loss(lambda message: self._status("failed", error=message))
        try:
            return self._run()
        except KeyboardInterrupt:
            self._status("stopped")
            raise
        except BaseException as error:
            self._status("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._metrics:
                self._metrics.close()

    def _run(self) -> Outcome:
        evaluation, stopped = None, False
        self._measure_before()
        if self._resumed and self._evaluation_due():  # checkpoints are written before the evaluation of their step
            evaluation = self._evaluate()
        while self.progress.step < self.config.training.steps and not stopped:
            stopped = self._one_step()
            self._checkpoint(stopped)
            if self._evaluation_due() and not stopped:
                evaluation = self._evaluate()
        self._save()
        if self._unsaved:
            raise TrainingError(self._unsaved)
        self._status("stopped" if stopped else "finished", evaluation=_summary(evaluation))
        return Outcome(evaluation, stopped)

    def _measure_before(self) -> None:
        """Where the base model trains beside a memory: its held-out loss before, which the run folder keeps."""
        config, evaluator = self.config, self.evaluator
        if evaluator is None or config.graft is None or config.model.trainable != "all":
            return
        settings = dataclasses.asdict(config.evaluation)
        kept = ranks.on_rank_zero(lambda: self.folder.read_json(_BEFORE) if self.folder else None)
        if kept is None and self.progress.step == 0:
            result = evaluator.run(self.engine)
            kept = {"evaluation": settings, "losses": {r.repo: r.losses["ablated"] for r in result.repositories}}
            if self.folder:
                self.folder.write(_BEFORE, json.dumps(kept, indent=1) + "\n")
        if isinstance(kept, dict) and kept.get("evaluation") == settings:
            evaluator.recall(kept["losses"])
        elif self.folder:
            logger.warning("no held-out loss before training with these evaluation settings; forgetting is not shown")

    def _evaluation_due(self) -> bool:
        return self.evaluator is not None and evaluation_due(self.progress.step, self.config)

    def _checkpoint(self, stopped: bool) -> None:
        """Save the run where that is due. A failure at an interval is a warning, at the end of the run an error."""
        interval, step = self.config.checkpoint.interval, self.progress.step
        last = stopped or step == self.config.training.steps
        if self.checkpoints is None or not interval or not (last or step % interval == 0):
            return
        problem = self.checkpoints.save(self.engine, dataclasses.asdict(self.progress), self.lanes, self.carried)
        if problem is None:
            return
        message = (
            f"the checkpoint of step {step} could not be written to {self.checkpoints.root} ({problem}); those "
            "before it are as they were. Free space there, or raise checkpoint.interval"
        )
        if last:
            self._unsaved = message  # raised when everything else is done
        elif self.folder:
            logger.warning("%s. Training goes on", message)

    def _one_step(self) -> bool:
        """One optimizer step; returns whether a rank was asked to stop."""
        start, step, config = time.perf_counter(), self.progress.step, self.config
        logging = (step + 1) % config.training.log_interval == 0 or step + 1 == config.training.steps
        passes = run_passes(
            self.engine, self.lanes, self.carried, config.training, ranks.world_size(), Pass(stats=logging)
        )
        gates = self.engine.gradients(list(self._gates.values())) if logging else {}
        norms = gradient_norms(gates)
        verdict = self._agree(passes, commit(passes, self.carried))
        lr = lr_at(step, config.training.steps, config.optimizer)
        grad_norm, applied = self.engine.step(lr, skip=not verdict.finite_loss)
        self._count(passes, verdict, applied)
        if logging:
            seconds = time.perf_counter() - start
            self._log(
                passes, verdict, {"grad_norm": grad_norm, "lr": lr, "seconds": seconds, **self._gate_gradients(norms)}
            )
        return verdict.stop

    def _agree(self, passes: Passes, finite_state: bool) -> Verdict:
        """The step's loss, and what any rank found wrong or was asked: one all-reduce."""
        finite = bool(torch.isfinite(passes.loss_sum))
        stop = self._stop or (self.folder is not None and self.folder.asked_to_stop)
        own = [float(passes.loss_sum) if finite else 0.0, float(not finite), float(not finite_state), float(stop)]
        total = ranks.sum_over(torch.tensor(own, device=self.engine.device)).tolist()
        loss = float("nan") if total[1] else total[0] / passes.targets
        return Verdict(loss, total[1] == 0, total[2] == 0, total[3] > 0)

    def _count(self, passes: Passes, verdict: Verdict, applied: bool) -> None:
        progress, limit = self.progress, self.config.training.nonfinite_limit
        progress.step += 1
        progress.tokens += passes.targets
        progress.skipped += not applied
        bad = not (applied and verdict.finite_loss and verdict.finite_state)
        progress.bad_in_a_row = progress.bad_in_a_row + 1 if bad else 0
        if progress.bad_in_a_row >= limit:
            raise TrainingError(
                f"the loss, a gradient or a memory state was not finite in {limit} steps in a row (last: step "
                f"{progress.step}). Lower optimizer.lr or graft.memory.step_size, or raise training.nonfinite_limit"
            )

    def _gate_gradients(self, norms: dict[str, float]) -> dict[str, Any]:
        if not self._gates:
            return {}
        by_layer = {layer: norms[name] for layer, name in self._gates.items()}
        return {"gate_gradient": by_layer, "gate_gradient_norm": math.hypot(*by_layer.values())}

    def _log(self, passes: Passes, verdict: Verdict, values: dict[str, Any]) -> None:
        stats = memory_stats(passes, self.engine.device)  # a collective: before rank 0 goes on alone
        if not (self._metrics and self.folder):
            return
        values = {
            "loss": verdict.loss,
            **values,
            **stats,
            "targets": passes.targets,
            "tokens_per_second": passes.targets / values["seconds"],
            "tokens": self.progress.tokens,
            "skipped_steps": self.progress.skipped,
            "finite_state": verdict.finite_state,
            "peak_memory_bytes": peak_memory_bytes(self.engine.device),
            "peak_host_bytes": peak_host_bytes(),
            "optimizer_state_bytes": self.engine.optimizer_state_bytes(),
        }
        self._metrics.write("train", self.progress.step, values)
        self._status("running")
        if self.reporter:
            self.reporter.step(self.progress.step, values)

    def _evaluate(self) -> Evaluation:
        assert self.evaluator is not None
        evaluation, step = self.evaluator.run(self.engine), self.progress.step
        if self._metrics and self.folder:
            self._metrics.write("evaluation", step, _summary(evaluation) or {})
            text = json.dumps(dataclasses.asdict(evaluation), indent=1) + "\n"
            self.folder.write(f"evaluation/step_{step:07d}.json", text)
            if self.reporter:
                self.reporter.evaluation(step, evaluation)
        return evaluation

    def _save(self) -> None:
        path = ranks.on_rank_zero(lambda: self.folder.path if self.folder else None)
        if path is None:
            return
        problem = None
        try:
            save_trained(self.engine, path, self.config, self.tokenizer, writes=self.folder is not None)
        except OutputError as error:
            problem = str(error)
        if problem := ranks.gather(problem)[0]:
            saved = self.config.checkpoint.interval > 0 and self.checkpoints is not None and not self._unsaved
            ways = f"The checkpoint of step {self.progress.step} is whole: with run.resume auto the run ends from there"
            lost = self._unsaved or "No checkpoint was asked for (checkpoint.interval), so that the training is lost"
            self._unsaved = f"what was trained could not be saved: {problem}. {ways if saved else lost}"

    def _status(self, state: str, **details: Any) -> None:
        if self.folder:
            progress = dataclasses.asdict(self.progress)
            self.folder.status(state, **progress, **details)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True  # acted on together, after this step


def evaluation_due(step: int, config: TrainConfig) -> bool:
    """Whether the held-out evaluation comes after this step, in a run that evaluates."""
    return step == config.training.steps or step % max(config.evaluation.interval, 1) == 0


def _summary(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    losses = {mode: dataclasses.asdict(e) for mode, e in evaluation.losses.items()}
    differences = {mode: dataclasses.asdict(e) for mode, e in evaluation.differences.items()}
    tokens = sum(r.tokens for r in evaluation.repositories)
    counts = {"repositories": len(evaluation.repositories), "tokens": tokens}
    perplexity = {mode: e.perplexity for mode, e in evaluation.losses.items()}
    forgetting = {} if evaluation.forgetting is None else {"forgetting": dataclasses.asdict(evaluation.forgetting)}
    return {"losses": losses, "minus_memory": differences, **forgetting, "perplexity": perplexity, **counts}
