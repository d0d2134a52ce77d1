"""The answers that sample.py leaves in a folder: samples.jsonl, a row an answer, and AlpacaEval's model_outputs.json.

Rows are appended as answers arrive, by rank r > 0 to samples-r.jsonl, and put in order when a run begins and ends: what was
there when a run was killed is kept, and how many ranks there were does not show."""

import fcntl
import json
import os
from pathlib import Path

from configurator import UserError
from text import sources

_lock = None  # file descriptor of the folder that this process holds


def lock(out_dir):
    """Keep other processes out of out_dir until this one ends. Raises UserError where another one is there."""
    global _lock
    if _lock is not None:
        os.close(_lock)
        _lock = None
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        _lock = os.open(out_dir, os.O_RDONLY)
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'another run is using {out_dir}: wait for its end, or choose another --out_dir') from None
    except OSError as error:
        if _lock is None:  # else it is a network file system without locks
            raise UserError(f'cannot write to {out_dir} ({error.strerror})') from None


def append(out_dir, rank, rows):
    """Add rows (json-able dicts) to a rank's file, on disk when this returns."""
    file = Path(out_dir) / ('samples.jsonl' if rank == 0 else f'samples-{rank}.jsonl')
    try:
        with open(file, 'a', encoding='utf-8') as stream:
            stream.write(''.join(json.dumps(row) + '\n' for row in rows))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(
            f'cannot write to {file} ({error.strerror}): make room and run the same command again'
        ) from None


def collect(out_dir, wanted):
    """Put all ranks' rows into one samples.jsonl, in order of (index, sample). Returns them, (index, sample) -> row.

    wanted(index, sample) -> what such a row must contain, or None if there is no such answer in this run. A last line that
    was cut off by a kill is dropped. Raises UserError for rows of something else."""
    file, found = Path(out_dir) / 'samples.jsonl', {}
    files = [f for f in [file, *sorted(file.parent.glob('samples-*.jsonl'))] if f.exists()]
    for path in files:
        try:
            *lines, rest = path.read_bytes().split(b'\n')  # rest: what has no end of line
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror}') from None
        for i, line in enumerate(lines):
            try:
                row = json.loads(line)
                key = row['index'], row['sample']
                expected = wanted(*key)
                sources.field(row, 'response'), row['finish']
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f'{path}, line {i + 1}, is damaged: mend or delete it') from None
            if expected is None or row | expected != row:
                raise UserError(
                    f'{path}, line {i + 1}, answers a prompt that is not in the data any more: choose another --out_dir'
                )
            found.setdefault(key, row)
    found = dict(sorted(found.items()))
    _replace(file, ''.join(json.dumps(row) + '\n' for row in found.values()))
    for path in files:
        if path != file:
            path.unlink()
    return found


def write_model_outputs(out_dir, rows):
    """AlpacaEval's model_outputs.json: instruction, output (without white space around it) and generator, first answers only."""
    outputs = [{'instruction': sources.instruction(row['prompt']), 'output': row['response'].strip(),
                'generator': row['generator']} for row in rows.values() if row['sample'] == 0]  # fmt: skip
    _replace(Path(out_dir) / 'model_outputs.json', json.dumps(outputs, indent=1))


def _replace(file, text):
    temporary = file.with_suffix('.tmp')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'w', encoding='utf-8') as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    except OSError as error:
        raise UserError(f'cannot write {file} ({error.strerror}): what was there before is as it was') from None
