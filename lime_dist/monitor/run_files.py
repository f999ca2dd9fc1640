"""Opens the files of a run folder on rank 0: what describes this start, and the sinks of its records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lime_dist.config.load import dump_config
from lime_dist.config.registry import SINKS
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError
from lime_dist.launchers import is_main_process
from lime_dist.monitor.metrics import MetricsFile
from lime_dist.monitor.records import Records
from lime_dist.monitor.starts import record_start
from lime_dist.monitor.tensorboard import TensorBoardLog


@dataclass(frozen=True)
class RunFiles:
    """What a rank records of its run.

    Attributes:
        records: writes to all sinks; on ranks other than 0 there are none.
        metrics: ``metrics.jsonl``; None on ranks other than 0.
        notes: where dashboards show the run, one line each.
    """

    records: Records
    metrics: MetricsFile | None = None
    notes: tuple[str, ...] = ()


def open_run_files(directory: Path, config: Config, step: int) -> RunFiles:
    """Write what describes the run, and open its sinks; on ranks other than 0 do nothing.

    Args:
        step: the last step that is done; later records of an earlier start are removed.

    Raises:
        LimeError: the folder cannot be written, or a dashboard cannot be reached.
    """
    if not is_main_process():
        return RunFiles(Records())
    try:
        record_start(directory, config, step)
        metrics = MetricsFile(directory / "metrics.jsonl", step)
        board = TensorBoardLog(directory / "tensorboard", dump_config(config), step)
    except OSError as error:
        raise LimeError(f"run.directory={directory} cannot be written: {error.strerror}") from None
    dashboards = [SINKS[name](directory, config) for name in config.monitor.sinks]
    return RunFiles(Records([metrics, board, *dashboards]), metrics, tuple(sink.note for sink in dashboards))
