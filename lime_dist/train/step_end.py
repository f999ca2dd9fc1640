"""The end of a training step: joint decisions, checkpoints, skipped updates, loss spikes, and stopping.

What only one rank notices (a signal, a full disk, different tokens) becomes here something that all ranks do together.
"""

from __future__ import annotations

import contextlib
import math
from typing import NoReturn

from lime_dist.data.state import TrainState
from lime_dist.distributed import agree
from lime_dist.errors import LimeError
from lime_dist.pipeline.clock import CHECKPOINT
from lime_dist.train.control import JointStatus, Status
from lime_dist.train.run import Run, SavedCheckpoint
from lime_dist.train.samples import combine, describe_difference, describe_not_finite
from lime_dist.train.signals import StopSignals, reason
from lime_dist.train.spikes import MAX_SPIKES, Spikes

HOW_TO_RESUME = "the same command resumes from the newest checkpoint"


class StepEnd:
    """All ranks call every method together.

    Attributes:
        stopped_by: what stopped the run before its end; None: nothing has.
    """

    def __init__(self, run: Run, signals: StopSignals, state: TrainState) -> None:
        self.stopped_by: str | None = None
        self._run, self._signals = run, signals
        self._saved_step: int | None = state.step
        self._consumed_before = state.consumed_samples  # by the steps before the newest one
        self._skipped = 0
        self._spikes = Spikes(run.config.train.spike_factor)
        self._reported_problem: str | None = None

    def check_update(self, state: TrainState, loss: float) -> None:
        """Report it if the update of the step that led to ``state`` was skipped.

        Raises:
            LimeError: too many updates in a row were skipped.
        """
        run, norm = self._run, self._run.optimizer.gradient_norm
        if math.isfinite(norm):
            self._skipped = 0
            return
        self._skipped += 1
        with self._watching("finding the micro-batch that was not finite at", state):
            losses = run.engine.micro_batch_losses()
            cause = describe_not_finite(
                run.config,
                run.order,
                self._consumed_before,
                run.replica,
                run.replicas,
                losses,
                run.optimizer.not_finite,
            )
        run.console.say(
            f"step {state.step}: loss {loss}, gradient norm {norm}; this update was skipped on all ranks; {cause}"
        )
        limit = run.config.train.max_consecutive_skips
        if self._skipped >= limit:
            self._fail(
                state,
                f"step {state.step}: {self._skipped} updates in a row were skipped (train.max_consecutive_skips={limit}), "
                f"the last one because {cause}; look at these samples or lower optimizer.lr; {HOW_TO_RESUME}",
            )

    def finish(self, state: TrainState, loss: float, validation_loss: float | None = None) -> TrainState:
        """Exchange the status of all ranks, save if it is time, stop if asked to; returns the state to continue from.

        Raises:
            LimeError: two stages of a replica read different tokens, or something cannot be written.
        """
        run = self._run
        joint = self._exchange(state, self._spikes.is_spike(loss))
        if joint.different_replicas:
            self._fail(state, self._describe_difference(state, joint.different_replicas[0]))
        if joint.failed:
            self._fail_for_records(state)
        self._report_problem(state)
        if run.saver.pending and not joint.writing:
            self._settle(state)
        if joint.spike:
            state = self._go_back(state, loss)
        interval = run.config.train.checkpoint_interval
        stop = joint.stop
        best = not joint.spike and self._is_best(state, validation_loss)
        if (best or (interval and state.step % interval == 0)) and not joint.spike:
            self._save(state)
            if best and validation_loss is not None:
                self._mark_best(state, validation_loss)
            stop = stop or self._exchange(state).stop  # a signal may have come while ranks were saving
        if stop:
            self._stop(state, stop)
        self._consumed_before = state.consumed_samples
        return state

    def keep_best(self, state: TrainState, validation_loss: float) -> None:
        """Name the checkpoint of ``state`` as the best, if it is on disk and none has a lower validation loss."""
        if self._is_best(state, validation_loss):
            self._mark_best(state, validation_loss)

    def _mark_best(self, state: TrainState, validation_loss: float) -> None:
        self._settle(state)
        if self._saved_step == state.step:
            try:
                self._run.saver.mark_best(state, validation_loss)
            except LimeError as error:
                self._report_not_saved(state, error, last=False)

    def _is_best(self, state: TrainState, validation_loss: float | None) -> bool:
        """Whether the run keeps its best checkpoint and this validation loss is the lowest so far."""
        if not self._run.config.train.keep_best or validation_loss is None:
            return False
        with self._watching("comparing validation losses at", state):
            return self._run.saver.improves(validation_loss)

    def save_last(self, state: TrainState) -> None:
        """Make sure that the last state is on disk.

        Raises:
            LimeError: it cannot be written, whatever ``checkpoint.on_error`` is; the steps since the last one would be lost.
        """
        self._settle(state, last=True)
        if self._saved_step != state.step:
            self._save(state, last=True)

    # -- joint decisions ----------------------------------------------------------------------------------------------

    def _exchange(self, state: TrainState, spike: bool = False) -> JointStatus:
        run = self._run
        stops_on_error = run.config.checkpoint.on_error == "stop"
        status = Status(
            stop=self._signals.received,
            writing=run.saver.writing,
            failed=stops_on_error and run.records.fatal is not None,
            spike=spike,
            checksum=None if run.train_batches is None else combine(run.train_batches.checksums),
        )
        with self._watching("exchanging the ranks' status after", state):
            return run.control.exchange(status)

    def _stop(self, state: TrainState, signal: int) -> None:
        self.save_last(state)
        self.stopped_by = reason(signal)
        self._run.console.say(
            f"stopped by {self.stopped_by} at step {state.step}: saved {self._run.saver.folder(state.step)}; "
            "the same command resumes from there"
        )

    def _watching(self, work: str, state: TrainState) -> contextlib.AbstractContextManager[None]:
        return self._run.engine.watching(f"{work} step {state.step}")

    def _fail(self, state: TrainState, line: str) -> NoReturn:
        """End the run on all ranks with the line of rank 0, after finishing the checkpoint that is being written."""
        with contextlib.suppress(LimeError):
            self._settle(state)
        with self._watching("ending the run after", state):
            agree(line)
        raise AssertionError("agree has raised")

    def _fail_for_records(self, state: TrainState) -> None:
        """End the run on all ranks if a rank cannot write its records."""
        with self._watching("ending the run after", state):
            problem = self._run.records.fatal
            self._settle(state)
            agree(None if problem is None else f"{problem}; {HOW_TO_RESUME} (checkpoint.on_error: stop)")

    def _describe_difference(self, state: TrainState, replica: int) -> str:
        run = self._run
        own = None
        if run.replica == replica and run.train_batches is not None:
            own = (run.engine.stage_id, " + ".join(run.config.data.paths), run.train_batches.checksums)
        with self._watching("comparing the tokens read at", state):
            difference = describe_difference(run.config, run.order, self._consumed_before, run.replicas, replica, own)
        return (
            f"step {state.step}: two stages of replica {replica} read different tokens for {difference}; "
            f"make both folders hold the same files (data_tools.inspect --verify finds the damaged one); {HOW_TO_RESUME}"
        )

    def _report_problem(self, state: TrainState) -> None:
        """Say once that records cannot be written, and once that they can be written again."""
        problem = self._run.records.problem
        if problem != self._reported_problem:
            self._run.console.say(f"step {state.step}: {problem or 'records are written again'}")
        self._reported_problem = problem

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, state: TrainState, last: bool = False) -> None:
        run = self._run
        run.records.flush()
        self._settle(state, last=last)
        try:
            with self._watching("the checkpoint of", state), run.engine.clock.measuring(CHECKPOINT):
                run.saver.begin(state)
            self._saved_step = state.step
            if last or not run.config.checkpoint.asynchronous:
                self._settle(state, last=last)
        except LimeError as error:
            self._report_not_saved(state, error, last)

    def _settle(self, state: TrainState, last: bool = False) -> None:
        """Finish the checkpoint that is being written, if there is one."""
        pending = self._run.saver.pending
        if pending is None:
            return
        try:
            with self._watching("the checkpoint of", pending), self._run.engine.clock.measuring(CHECKPOINT):
                saved = self._run.saver.finish()
        except LimeError as error:
            self._report_not_saved(state, error, last)
        else:
            self._report_saved(state, saved)

    def _report_not_saved(self, state: TrainState, error: LimeError, last: bool) -> None:
        self._saved_step = None
        if last or self._run.config.checkpoint.on_error == "stop":
            raise error
        self._run.console.say(f"step {state.step}: {error}; training continues (checkpoint.on_error: continue)")

    def _report_saved(self, state: TrainState, saved: SavedCheckpoint) -> None:
        duration = f"in {saved.blocked:.2f} s"
        if saved.background:
            duration = f"in the background in {saved.background:.2f} s; training waited {saved.blocked:.2f} s"
        self._run.console.say(f"step {state.step}/{self._run.config.train.steps} | saved {saved.path} {duration}")
        for problem in saved.problems:
            self._run.console.say(problem)

    # -- spikes -------------------------------------------------------------------------------------------------------

    def _go_back(self, state: TrainState, loss: float) -> TrainState:
        """Restore the model of the newest checkpoint and continue with the samples that come next."""
        run, factor = self._run, self._run.config.train.spike_factor
        spike = (
            f"step {state.step}: the loss jumped to {loss:.4f} "
            f"(train.spike_factor={factor}, recent median {self._spikes.median:.4f})"
        )
        if self._spikes.too_many:
            self._fail(
                state,
                f"{spike}, again after going back {MAX_SPIKES} times without a new best; lower optimizer.lr; {HOW_TO_RESUME}",
            )
        self._settle(state)
        with self._watching("going back from", state):
            restored, _ = run.restore()
            if restored is None:
                run.console.say(f"{spike}; there is no checkpoint to go back to")
                return state
        back = TrainState(restored.state.step, state.consumed_samples)
        self._saved_step = back.step
        run.engine.start_after(back.step)
        run.records.rewind(back.step)
        run.console.go_back(back.step)
        run.console.say(
            f"{spike}; back to step {back.step} ({restored.path}), continuing after the {state.consumed_samples:,} samples "
            "consumed so far"
        )
        return back
