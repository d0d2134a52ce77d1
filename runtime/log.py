"""Where a run leaves its traces: out_dir/config.json, metrics.jsonl, the screen, and wandb or tensorboard if asked.

The first part keeps a folder to one run: check_out_dir() and check_names() look at it before anything is loaded, and
claim_out_dir() writes config.json when the run begins. Log then writes the rows."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from configurator import UserError, main_rank
from runtime.files import append, append_kept, cut_rows, replace_text, say, writing

# options that may differ when a run is continued: they change neither the result nor what is compared
NEUTRAL = set('resume out_dir activation_checkpointing keep_last log_every save_every max_tokens compile wandb tensorboard tp '
              'device_map cpu_offload shard skip_bad_steps deterministic save_dtype reward_workers reward_timeout'.split())  # fmt: skip
# files and folders that a run puts into its out_dir, beside config.json and .lock
WRITTEN = 'model adapter checkpoints metrics.jsonl samples.jsonl bad_step.jsonl latest wandb_id.txt'.split()
# metrics that a line on the screen shows -> their names there
SHOWN = {'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
         'rewards/rejected': 'rejected', 'score': 'reward', 'gold': 'gold', 'kl/samples': 'kl', 'clipped': 'clipped',
         'explained_variance': 'ev', 'length': 'length', 'ended': 'ended'}  # fmt: skip


# ---- to which run a folder belongs ----


def check_names(out_dir):
    """Raise UserError if a run in out_dir would overwrite files that it does not own.

    None of the files that a run writes may be a symlink. Without config.json no run owns the folder, so none may exist, except
    .lock, which a run creates before config.json."""
    folder = Path(out_dir)
    has_config = (folder / 'config.json').exists()
    for name in ('.lock', 'config.json', *WRITTEN):
        # NAME.tmp is the temporary file of atomic writes
        for path in (folder / name, folder / f'{name}.tmp'):
            if path.is_symlink():
                raise UserError(f'{path} is a symbolic link, and a run would write through it: remove the link')
            if name in WRITTEN and not has_config and path.exists():
                found = f'{out_dir} has {path.name}, but no config.json that says which run has written it'
                raise UserError(f'{found}: put that back, or choose another --out_dir')


def recorded(out_dir):
    """Return the run that out_dir/config.json describes: a dict of its 'script' ('' if not known), 'options' and 'contents'.

    Returns None if there is no such file, or nothing but it: that run has left nothing to protect. Raises UserError if the file
    is damaged."""
    file = Path(out_dir) / 'config.json'
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        command = record.get('command', [''])
        run = {'script': Path(command[0]).name}
        run['options'] = dict(record['config'])
        run['contents'] = dict(record.get('contents', {}))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{file} is damaged: choose another --out_dir, or delete it') from None
    has_left_more = set(os.listdir(out_dir)) - {'config.json', '.lock'}
    return run if has_left_more else None


def differences(recorded_run, run, neutral=NEUTRAL):
    """Return how run differs from recorded_run, as a list of phrases; [] if they are the same run.

    Each is a dict of 'script', 'options' and 'contents', as identify() in checkpoint.py makes it. neutral: options that may
    differ. Something that an older version did not record counts as the same."""
    phrases = []
    if recorded_run['script'] not in ('', run['script']):
        phrases.append(f'of {recorded_run["script"]} there and of {run["script"]} here')

    # an option that has come into being since then counts as the same if nobody has set it
    options, recorded_options = run['options'], recorded_run['options']
    origin = getattr(options, 'origin', {})
    for name, value in options.items():
        is_new_default = name not in recorded_options and origin.get(name) == 'default'
        if name in neutral or is_new_default:
            continue
        value_there = recorded_options.get(name)
        if value_there != value:
            phrases.append(f'{name} {value_there!r} there and {value!r} here')

    for name, content in run['contents'].items():
        content_there = recorded_run['contents'].get(name, content)
        if content_there == content:
            continue
        # of a model there is a hash for each file: name the first file whose pair (file, hash) only one of the two has
        if isinstance(content, dict):
            file, _hash = min(content_there.items() ^ content.items())
            phrases.append(f'{name} {options.get(name)!r} has changed since: {file}')
        # of examples there is one hash for all
        else:
            phrases.append(f'the {name} have changed since: their tokens, labels or order')
    return phrases


def check_same(place, recorded_run, run, neutral=NEUTRAL):
    """Raise UserError if run differs from recorded_run; print a note if recorded_run lacks hashes to compare.

    place: start of the message, such as 'FOLDER holds'. Other arguments: those of differences()."""
    # three differences are enough for an error message
    phrases = ', '.join(differences(recorded_run, run, neutral)[:3])
    if phrases:
        advice = 'put back what it began with, or choose another --out_dir'
        raise UserError(f'{place} a different run ({phrases}): {advice}')
    unhashed = ', '.join(sorted(run['contents'].keys() - recorded_run['contents'].keys()))
    if unhashed:
        say(f'note: {place} a run of an older version, which kept no hash of {unhashed}: not checked')


def check_out_dir(out_dir, config, resume, neutral=NEUTRAL):
    """Raise UserError if a run with these options cannot have out_dir, or if the package of its tracker is not installed.

    out_dir must be writable. It must not hold a different run (neutral: options that may differ), nor this one if that is
    finished, or if resume is off."""
    # a missing package is said before anything is read
    for name in ('wandb', 'tensorboard'):
        if config.get(name) and not importlib.util.find_spec(name):
            raise UserError(f'--{name} needs a package that is not installed: pip install {name}')

    # where out_dir is not made yet, the nearest folder above it has to take it
    folder = Path(out_dir)
    with writing(f'to out_dir {out_dir}'):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=nearest).close()
        recorded_run = recorded(out_dir)
    if not recorded_run:
        return

    # contents are compared later, when models and data are loaded
    run = {'script': Path(sys.argv[0]).name, 'options': config, 'contents': {}}
    check_same(f'{out_dir} holds', recorded_run, run, neutral)
    is_finished = (folder / 'model').exists()
    if is_finished or not resume:
        state = 'finished' if is_finished else 'begun, and --resume is off'
        raise UserError(f'{out_dir} holds this run already ({state}): choose another --out_dir, or delete it')


def claim_out_dir(out_dir, config, contents=None):
    """Write config.json, which says to which run out_dir belongs, now that the run begins.

    It holds the options, the command, git's commit ('' if there is none), and versions. contents: hashes of models and data from
    identify() in checkpoint.py. Raises UserError."""
    # through a shell, which reports a missing git by its exit code: without one, run() would raise
    git = subprocess.run('git rev-parse HEAD', shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    record = {'config': dict(config), 'command': sys.argv, 'commit': git.stdout.strip()}
    record['versions'] = {name: version(name) for name in ('torch', 'transformers')}
    if contents:
        record['contents'] = contents
    replace_text(Path(out_dir) / 'config.json', json.dumps(record, indent=1))


# ---- trackers ----


def _reason(error):
    """Return what an error of a tracker's code says: its first line, of 200 characters at most, without the key of wandb."""
    lines = str(error).splitlines() or [type(error).__name__]
    reason = lines[0]
    key = os.environ.get('WANDB_API_KEY')
    if key:
        reason = reason.replace(key, '...')
    return reason[:200]


def _open_wandb(project, out_dir):
    """Open the Weights & Biases run of out_dir, anew or again. Returns two functions: write(row) and close().

    Its id is kept in out_dir/wandb_id.txt, so that a resumed run goes on in the same one."""
    import wandb

    id_file = out_dir / 'wandb_id.txt'
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex())
    # there, the options stand beside command, commit and versions
    record = json.loads((out_dir / 'config.json').read_text())
    options = record.pop('config') | record
    names = {'project': project, 'name': out_dir.resolve().name, 'id': id_file.read_text()}
    run = wandb.init(**names, dir=out_dir, resume='allow', config=options)

    def write(row):
        run.log(row, step=row['counters/examples'])

    return write, run.finish


def _open_tensorboard(out_dir, start):
    """Open tensorboard's file in out_dir. Returns two functions: write(row) and close(). start: examples seen before."""
    from torch.utils.tensorboard import SummaryWriter

    # a resumed run repeats the steps behind its checkpoint: tensorboard hides what it had of them
    purge_step = start + 1 if start else None
    writer = SummaryWriter(out_dir, purge_step=purge_step, flush_secs=10)

    def write(row):
        for name in row.keys() - {'split'}:
            writer.add_scalar(name, row[name], row['counters/examples'])

    return write, writer.close


# ---- rows ----


class Log:
    """Writes a row for each step and each evaluation: to metrics.jsonl, to the trackers, and as a line to the screen.

    Rank 0 does so. On other ranks the methods do nothing."""

    say = staticmethod(say)

    def __init__(self, out_dir, total, start, every, wandb=None, tensorboard=False, evaluated=-1):
        """Remove the rows that this run will write itself, and open the trackers.

        total: examples of the run; start: those before it, not 0 after a resume; evaluated: examples at the last evaluation that
        was complete, -1 if none was; every: examples between two lines on the screen; wandb: a project, or None."""
        self.total, self.start, self.every = total, start, every
        self.began = time.time()
        if not main_rank():
            return
        folder = Path(out_dir)
        self.path = folder / 'metrics.jsonl'

        def came_before(row):
            # a new run keeps none, not even those of before its first step
            if not start:
                return False
            last = evaluated if row['split'] == 'eval' else start
            return row['counters/examples'] <= last

        cut_rows(folder / 'samples.jsonl', lambda row: row['examples'] <= evaluated)
        cut_rows(folder / 'bad_step.jsonl', lambda row: row['examples'] <= start)
        cut_rows(self.path, came_before)

        # name -> (write, close), or None if it could not be opened
        self.trackers = {}
        self.failed = set()
        if wandb:
            self.trackers['wandb'] = self._attempt('wandb', _open_wandb, wandb, folder)
        if tensorboard:
            self.trackers['tensorboard'] = self._attempt('tensorboard', _open_tensorboard, folder, start)
        # for an error that nobody catches python calls sys.excepthook, which ends the process before trackers can write the
        # rows that they hold: close them first
        hook_before = sys.excepthook

        def close_and_report(*error):
            self.close()
            hook_before(*error)

        sys.excepthook = close_and_report

    def _attempt(self, name, function, *args):
        """Call a tracker's function and return its result, or None if it raises anything.

        The run then goes on without this tracker: it is marked as failed, and a note says so once."""
        try:
            return function(*args)
        except (Exception, SystemExit) as error:
            if name not in self.failed:
                advice = f'rows may be missing there; {self.path} has all of them'
                say(f'note: {name} failed ({_reason(error)}): {advice}')
            self.failed.add(name)
            return None

    def row(self, split, examples, metrics):
        """Write a row of metrics (name -> number) after so many examples. split: train, eval, or check (before the first step).

        An evaluation is also a line on the screen. So is each step that reaches or crosses a multiple of log_every."""
        if not main_rank():
            return
        # json has no number for NaN and infinity
        row = {'split': split, 'counters/examples': examples}
        row |= {name: value for name, value in metrics.items() if math.isfinite(value)}
        append(self.path, json.dumps(row) + '\n')
        # one that could not be opened has failed, too
        for name in self.trackers.keys() - self.failed:
            write, _close = self.trackers[name]
            self._attempt(name, write, row)

        before = examples - metrics.get('counters/step_examples', 0)
        is_due = examples // self.every > before // self.every
        if split == 'eval' or is_due:
            say(self.line(row))

    def line(self, row):
        """Return a row as one readable line: examples, the metrics in SHOWN, and of a step its speed and the time left."""
        split, examples = row['split'], row['counters/examples']
        parts = [f'{split:5s} {examples:>7d}/{self.total}']
        for metric, short_name in SHOWN.items():
            # in a row of split train, loss is loss/train, and rewards/margins is rewards_train/margins
            group, slash, rest = metric.partition('/')
            key = f'{group}_{split}/{rest}' if slash else f'{group}/{split}'
            if key in row:
                parts.append(f'{short_name} {row[key]:.4g}')

        if split == 'train':
            seconds_each = (time.time() - self.began) / max(1, examples - self.start)
            # not below 0, even if the clock is set back
            left = max(0, int(seconds_each * (self.total - examples)))
            grad = row.get('grad_norm', math.nan)
            speed = row.get('examples_per_second', math.nan)
            parts.append(f'grad {grad:.3g}  {speed:.1f} ex/s  {left // 60}:{left % 60:02d} left')
        return '  '.join(parts)

    def close(self):
        """Write the rows that wait in memory, and close the trackers. A second call finds nothing left to close.

        The process ends by os._exit, without the clean-up in which trackers would write what they hold."""
        if not main_rank():
            return
        try:
            append_kept()
        except UserError as error:
            say(f'warning: {error}, and are lost')
        while self.trackers:
            name, functions = self.trackers.popitem()
            # None: it was never open
            if functions:
                _write, close = functions
                self._attempt(name, close)


def progress(total, unit, description, **options):
    """Return a tqdm progress bar, shown on the main rank only; if stderr is not a terminal, it prints a line every 30 s.

    total: number of items, or None if unknown; unit: with a leading space, such as ' rows'; options: passed to tqdm."""
    from tqdm import tqdm

    # options come last, so that callers can override 'disable'
    options = {'total': total, 'unit': unit, 'desc': description, 'disable': not main_rank()} | options
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, leave=False, **options)

    # write plain lines instead of the carriage returns and padding with which tqdm redraws its bar
    def write_line(text):
        if text.strip():
            sys.stderr.write(f'{text.strip()}\n')

    file = SimpleNamespace(write=write_line, flush=sys.stderr.flush)
    bar_format = '{desc}: {n_fmt}{unit}, {rate_fmt}'
    if total:
        bar_format = '{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}'
    return tqdm(file=file, mininterval=30, delay=30, bar_format=bar_format, **options)


def per_second(amount, seconds):
    """Return amount / seconds, or NaN if the clock stood still or was set back. Log.row leaves a NaN out."""
    return amount / seconds if seconds > 0 else math.nan


def schedule(step, steps, warmup, shape):
    """Return the factor of the learning rate at a step, of steps 0 to steps - 1: linear warm-up, then the decay of this shape.

    warmup: how many steps it takes. shape: constant, or linear or cosine to zero."""
    # from 1 at the end of the warm-up to 0 behind the last step
    left = (steps - step) / max(1, steps - warmup)
    decay = min(1.0, max(0.0, left))
    if shape == 'constant':
        decay = 1.0
    elif shape == 'cosine':
        decay = (1 - math.cos(math.pi * decay)) / 2
    # the first step has a rate above 0 already
    rising = (step + 1) / (warmup + 1)
    return min(1.0, rising, decay)
