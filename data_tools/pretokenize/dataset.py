"""Text to token shards: cut the input into units, encode them in worker processes, describe the result in dataset.json.

Workers write into a scratch folder. Only the parent moves a unit's finished shards to their final names and then records
the unit in ``units.ndjson``. After a kill, the next run continues from the recorded units whose shards are there.
dataset.json is written last, so a folder that has it is complete. The bytes of the shards depend only on the names and
content of the input, the tokenizer and the settings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools import TOOL_VERSION
from data_tools.pretokenize.duplicates import HashUnit, find_duplicates, hashed
from data_tools.pretokenize.encoding import EncodeUnit, Layout
from data_tools.pretokenize.kept import forget
from data_tools.pretokenize.manifest import Manifest, Result, finish, is_complete, recorded_commit
from data_tools.pretokenize.parts import PART_FILE, Part, finish_part, is_complete_part
from data_tools.pretokenize.pool import UnitPool
from data_tools.pretokenize.units import Selection, Unit, plan_hash, plan_units
from data_tools.sources.documents import check_conditions, documents
from data_tools.sources.filters import Filter
from data_tools.sources.footers import FOOTERS_FILE, Footers
from data_tools.sources.inputs import HubInputFile, InputFile, fingerprint, list_inputs
from data_tools.sources.tally import Tally
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.encoder_choice import EncoderDifference, choose_encoder
from data_tools.tokenizer.round_trip import first_failure
from lime_dist.data.files import lock_folder, remove, write_atomic
from lime_dist.errors import LimeError

TOKENIZER_FOLDER, SCRATCH, DUPLICATES = "tokenizer", ".scratch", ".duplicates"
CHECKED_DOCUMENTS = 64


def check_round_trip(given: str, files: list[InputFile], selection: Selection, tokenizer: Tokenizer) -> list[str]:
    """Check, before anything is written, that the input has text and that its first documents survive encoding and decoding.

    Returns:
        These documents.

    Raises:
        LimeError: there is no text, or a text changes although its facts say that it is exact.
    """
    tally = Tally()
    rows = documents(files, selection.text_column, tally, selection.filters)
    texts = [text for *_, text in islice(rows, CHECKED_DOCUMENTS)]
    if not texts:
        dropped = "".join(f"; --where {one} drops {tally.dropped[str(one)]}" for one in selection.filters)
        reason = (
            f"{tally.filtered} of {tally.rows} rows do not satisfy --where, and the others are empty or null{dropped}"
        )
        reason = f"first error: {tally.rejected[0]}" if tally.rejected else reason
        raise LimeError(f"--input {given}: no text found; {reason}; give other files, --text-column or --where")
    failure = first_failure(tokenizer, texts)
    if failure is not None and not tokenizer.exact:
        print(f"decoding changes this text, which the import of {tokenizer.folder} allowed: {failure[:80]!r}")
    elif failure is not None:
        raise LimeError(
            f"{tokenizer.folder}: encoding and decoding changes this text of the input: {failure[:80]!r}; train a "
            "tokenizer with data_tools.tokenizer"
        )
    return texts


def pretokenize(options: argparse.Namespace) -> None:
    """Run the command: reuse a complete dataset, or start or resume one and finish it."""
    part = Part.parse(options.part) if options.part else None
    tokenizer, output = Tokenizer(options.tokenizer), Path(options.output)
    begun = None if options.fresh else recorded_commit(output, options.input)
    files = list_inputs(options.input, begun)
    selection = Selection(
        options.text_column, tuple(dict.fromkeys(map(Filter.parse, options.where))), options.on_error == "stop"
    )
    layout = Layout(
        validation=options.validation_fraction,
        test=options.test_fraction,
        shard_tokens=options.shard_tokens,
        shuffle=options.shuffle,
        bos=options.bos,
        eos=not options.no_eos,
    )
    if options.bos and tokenizer.bos_id < 0:
        raise LimeError(f"--bos: the tokenizer in {options.tokenizer} has no bos; omit --bos")
    header = make_header(options, tokenizer, selection, layout, files, part)
    with lock_folder(output):
        remove_leftovers(output)
        if options.fresh:
            (output / PART_FILE).unlink(missing_ok=True)
        manifest, duplicates = Manifest(output, header, fresh=options.fresh), output / DUPLICATES
        complete = is_complete_part(output, options.verify) if part else is_complete(output, options.verify)
        if options.fresh or complete:  # complete: a kill may have left these behind
            shutil.rmtree(duplicates, ignore_errors=True)
            (output / FOOTERS_FILE).unlink(missing_ok=True)
        if complete:
            print(f"{f'part {part}' if part else 'dataset'} complete, reused: {output}")
            return
        check_conditions(files, selection.filters)
        texts = check_round_trip(options.input, files, selection, tokenizer)
        differs = manifest.encoder_difference()
        chosen = choose_encoder(options.encoder, tokenizer, texts, differs)
        tokenizer.copy_to(output / TOKENIZER_FOLDER)
        footers = Footers(output)
        units = plan_units(files, options.text_column, options.shard_tokens, footers)
        plan, every_unit = plan_hash(units), units
        results = manifest.load(len(units), plan, options.verify)
        units = part.of(units) if part else units
        if results:
            print(f"{len(results)} of {len(units)} units are finished; continuing with the rest")
        todo = [unit for unit in units if unit.index not in results]
        if todo and options.drop_duplicates:
            mark_duplicates(duplicates, plan, every_unit, {unit.index for unit in todo}, selection, options.workers)
        # A unique name: whatever an orphaned worker of a killed run still writes cannot end up among our shards.
        scratch = output / f"{SCRATCH}-{os.getpid()}-{time.time_ns()}"
        scratch.mkdir()
        marks = duplicates if options.drop_duplicates else None

        def encode(converted_model: str | None, differs: str) -> None:
            """Encode the units that have no result."""

            def publish(result: Result) -> None:
                result = {**result, **({"differs": differs} if differs else {}), "plan": plan}
                manifest.publish(result, scratch)
                results[result["unit"]] = result
                forget(duplicates, result["unit"])

            task = EncodeUnit(output / TOKENIZER_FOLDER, converted_model, scratch, selection, layout, marks)
            todo = [unit for unit in units if unit.index not in results]
            text_bytes, seconds = UnitPool(task, options.workers, "pretokenize").run(units, todo, publish)
            print(f"encoded {text_bytes / 1e6:.1f} MB in {seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s")

        try:
            if todo:
                encode(chosen.converted_model, differs)
        except EncoderDifference as error:
            doubtful = manifest.drop_encoded_with(chosen.encoder_name, results)
            if options.encoder != "auto":
                raise LimeError(
                    f"{error}; the {doubtful} finished units with its ids are deleted: go on with --encoder sentencepiece"
                ) from None
            print(f"{error}: going on with sentencepiece; the {doubtful} finished units with its ids are encoded again")
            encode(None, str(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        in_order = [results[unit.index] for unit in units]
        if part:
            facts = {
                "source": options.input,
                "plan": plan,
                "units": len(every_unit),
                "max_rejected": options.max_rejected,
            }
            finish_part(manifest, in_order, facts)
        else:
            finish(manifest, in_order, tokenizer, options.input, selection.stop_at_rejection, options.max_rejected)
        footers.remove()
        shutil.rmtree(duplicates, ignore_errors=True)


def make_header(
    options: argparse.Namespace,
    tokenizer: Tokenizer,
    selection: Selection,
    layout: Layout,
    files: list[InputFile],
    part: Part | None,
) -> dict[str, Any]:
    """What determines the dataset: a run resumes a folder only with the same header."""
    header: dict[str, Any] = {
        "settings": {
            "tokenizer_hash": tokenizer.hash,
            "text_column": options.text_column,
            "where": [str(condition) for condition in selection.filters],
            "drop_duplicates": options.drop_duplicates,
            **asdict(layout),
            "tool_version": TOOL_VERSION,
        },
        "inputs": [fingerprint(file) for file in files],
        **({"part": str(part)} if part else {}),
    }
    if isinstance(files[0], HubInputFile):
        header["hub"] = {"input": options.input, "commit": files[0].commit}
    return header


def remove_leftovers(output: Path) -> None:
    """Delete what a killed run was writing."""
    for left in [*output.glob(f"{SCRATCH}-*"), *output.glob(".*.tmp"), *(output / TOKENIZER_FOLDER).glob(".*.tmp")]:
        if (problem := remove(left)) is not None:
            print(f"warning: cannot delete {problem}")


def mark_duplicates(
    folder: Path, plan: str, units: list[Unit], todo: set[int], selection: Selection, workers: int
) -> None:
    """Hash the units that are not hashed yet, then compare all hashes; the result is written to ``folder``.

    Args:
        units: all of the dataset; a part needs the hashes of the other parts too.
        todo: the units that will be encoded next.
    """
    marker = folder / "plan"
    if marker.exists() and marker.read_bytes() != plan.encode():
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    write_atomic(marker, plan.encode())
    unhashed = [unit for unit in units if not hashed(folder, unit)]
    if unhashed:
        UnitPool(HashUnit(folder, selection, todo), workers, "hashing").run(units, unhashed, lambda unit: None)
    print(f"duplicates: {find_duplicates(folder, len(units)):,}")
