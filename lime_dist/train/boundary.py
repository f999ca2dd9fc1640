"""Between two steps: what the ranks agree on, checkpoints, skipped updates, going back behind a spike, and stops.

What one rank alone notices (a signal, a full disk, other tokens) becomes something that all ranks do together here.
"""

from __future__ import annotations

import contextlib
import math
from typing import NoReturn

from lime_dist.checkpoint import store
from lime_dist.checkpoint.saver import Saved
from lime_dist.data.state import TrainState
from lime_dist.distributed import agree
from lime_dist.errors import LimeError
from lime_dist.pipeline.clock import CHECKPOINT
from lime_dist.train.control import Agreed, Word
from lime_dist.train.run import Run
from lime_dist.train.samples import combine, describe_difference, not_finite
from lime_dist.train.signals import StopSignals, reason
from lime_dist.train.spikes import MOST, Spikes

AGAIN = "the same command goes on from the newest checkpoint"


class Boundary:
    """Every method is called by all ranks together.

    Attributes:
        stopped: what stopped the run before its end; None: nothing has.
    """

    def __init__(self, run: Run, signals: StopSignals, state: TrainState) -> None:
        self.stopped: str | None = None
        self._run, self._signals = run, signals
        self._saved: int | None = state.step
        self._before = state.consumed_samples  # by the steps before the newest one
        self._skipped = 0
        self._spikes = Spikes(run.config.train.spike_factor)
        self._said: str | None = None

    def updated(self, state: TrainState, loss: float) -> None:
        """Say so if the step before ``state`` was skipped.

        Raises:
            LimeError: it was one too many in a row.
        """
        run, norm = self._run, self._run.optimizer.gradient_norm
        if math.isfinite(norm):
            self._skipped = 0
            return
        self._skipped += 1
        consumed = self._before
        with self._watching("which micro-batch was not finite at", state):
            losses = run.engine.micro_batch_losses()
            found = not_finite(run.config, run.order, consumed, run.replica, run.replicas, losses)
        run.console.say(
            f"step {state.step}: loss {loss}, gradient norm {norm}; this update was skipped on all ranks; {found}"
        )
        most = run.config.train.max_consecutive_skips
        if self._skipped >= most:
            self._fail(
                state,
                f"step {state.step}: {self._skipped} updates in a row were skipped (train.max_consecutive_skips={most}), "
                f"the last one because {found}; look at these samples or lower optimizer.lr; {AGAIN}",
            )

    def cross(self, state: TrainState, loss: float) -> TrainState:
        """Agree, save if it is time, and stop if somebody is asked to; returns the state to go on from.

        Raises:
            LimeError: both ends of a replica read different tokens, or something cannot be written.
        """
        run = self._run
        agreed = self._exchange(state, self._spikes.is_spike(loss))
        if agreed.different:
            self._fail(state, self._difference(state, agreed.different[0]))
        if agreed.trouble:
            with self._watching("what is the trouble after", state):
                problem = run.records.problem
                self._settle(state)
                agree(None if problem is None else f"{problem}; {AGAIN} (checkpoint.on_error: stop)")
        self._complain(state)
        if run.saver.pending and not agreed.writing:
            self._settle(state)
        if agreed.spike:
            state = self._go_back(state, loss)
        interval = run.config.train.checkpoint_interval
        stop = agreed.stop
        if interval and state.step % interval == 0 and not agreed.spike:
            self._save(state)
            stop = stop or self._exchange(state).stop  # it may have come while all were busy saving
        if stop:
            self.close(state)
            self.stopped = reason(stop)
            run.console.say(
                f"stopped by {self.stopped} at step {state.step}: saved "
                f"{run.saver.directory / store.folder_name(state.step)}; the same command goes on from there"
            )
        self._before = state.consumed_samples
        return state

    def close(self, state: TrainState) -> None:
        """Let the last state be on disk.

        Raises:
            LimeError: it cannot be written, whatever ``checkpoint.on_error`` says: there is nothing to go on with.
        """
        self._settle(state, last=True)
        if self._saved != state.step:
            self._save(state, last=True)

    # -- agreeing -----------------------------------------------------------------------------------------------------

    def _exchange(self, state: TrainState, spike: bool = False) -> Agreed:
        run = self._run
        stops = run.config.checkpoint.on_error == "stop"
        word = Word(
            stop=self._signals.came,
            writing=run.saver.writing,
            trouble=stops and run.records.problem is not None,
            spike=spike,
            checksum=None if run.train_batches is None else combine(run.train_batches.checksums),
        )
        with self._watching("what the ranks agree on after", state):
            return run.control.exchange(word)

    def _watching(self, work: str, state: TrainState) -> contextlib.AbstractContextManager[None]:
        return self._run.engine.watching(f"{work} step {state.step}")

    def _fail(self, state: TrainState, line: str) -> NoReturn:
        """End the run on all ranks with rank 0's line; what is half written is finished first."""
        with contextlib.suppress(LimeError):
            self._settle(state)
        with self._watching("why to end after", state):
            agree(line)
        raise AssertionError("agree has raised")

    def _difference(self, state: TrainState, replica: int) -> str:
        run = self._run
        consumed = self._before
        own = None
        if run.replica == replica and run.train_batches is not None:
            own = (run.engine.stage_id, " + ".join(run.config.data.paths), run.train_batches.checksums)
        with self._watching("who read other tokens at", state):
            found = describe_difference(run.config, run.order, consumed, run.replicas, replica, own)
        return (
            f"step {state.step}: the first and the last stage of replica {replica} read different tokens for {found}; "
            f"let both folders hold the same files (data_tools.inspect --verify tells which is damaged); {AGAIN}"
        )

    def _complain(self, state: TrainState) -> None:
        """Say once that records cannot be written, and once that they can again."""
        problem = self._run.records.problem
        if problem != self._said:
            self._run.console.say(f"step {state.step}: {problem or 'records are written again'}")
        self._said = problem

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, state: TrainState, last: bool = False) -> None:
        run = self._run
        run.records.flush()
        self._settle(state, last=last)
        try:
            with self._watching("the checkpoint of", state), run.engine.clock.measuring(CHECKPOINT):
                run.saver.begin(state)
            self._saved = state.step
            if last or not run.config.checkpoint.asynchronous:
                self._settle(state, last=last)
        except LimeError as error:
            self._not_saved(state, error, last)

    def _settle(self, state: TrainState, last: bool = False) -> None:
        """Finish the checkpoint under way, if there is one."""
        pending = self._run.saver.pending
        if pending is None:
            return
        try:
            with self._watching("the checkpoint of", pending), self._run.engine.clock.measuring(CHECKPOINT):
                saved = self._run.saver.finish()
        except LimeError as error:
            self._not_saved(state, error, last)
        else:
            self._say_saved(state, saved)

    def _not_saved(self, state: TrainState, error: LimeError, last: bool) -> None:
        self._saved = None
        if last or self._run.config.checkpoint.on_error == "stop":
            raise error
        self._run.console.say(f"step {state.step}: {error}; training goes on (checkpoint.on_error: continue)")

    def _say_saved(self, state: TrainState, saved: Saved) -> None:
        cost = f"in {saved.blocked:.2f} s"
        if saved.background:
            cost = f"in the background in {saved.background:.2f} s; training waited {saved.blocked:.2f} s"
        self._run.console.say(f"step {state.step}/{self._run.config.train.steps} | saved {saved.path} {cost}")
        for problem in saved.problems:
            self._run.console.say(problem)

    # -- spikes -------------------------------------------------------------------------------------------------------

    def _go_back(self, state: TrainState, loss: float) -> TrainState:
        """To the newest checkpoint's model, on with the data that come now."""
        run, factor = self._run, self._run.config.train.spike_factor
        jumped = f"step {state.step}: the loss jumped to {loss:.4f} (train.spike_factor={factor}, recent median {self._spikes.median:.4f})"
        if self._spikes.too_many:
            self._fail(
                state, f"{jumped}, again after going back {MOST} times without a new best; lower optimizer.lr; {AGAIN}"
            )
        self._settle(state)
        with self._watching("going back from", state):
            found, lines = store.find_newest(run.saver.directory)
            for line in lines:
                run.console.say(line)
            if found is None:
                run.console.say(f"{jumped}; there is no checkpoint to go back to")
                return state
            store.load(found, run.config, run.order.num_samples, run.optimizer)
        back = TrainState(found.state.step, state.consumed_samples)
        run.engine.global_steps = self._saved = back.step
        run.records.rewind(back.step)
        run.console.go_back(back.step)
        run.console.say(
            f"{jumped}; back to step {back.step} ({found.path}), on with the samples after the {state.consumed_samples:,} consumed"
        )
        return back
