"""The logs of a run: out_dir/config.json, metrics.jsonl, lines on the screen, and optionally wandb or tensorboard.

check_out_dir() and check_names() protect out_dir from other runs, before anything is loaded. claim_out_dir() writes
config.json when training starts. Then Log writes a row for each step and evaluation."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from configurator import UserError, main_rank
from runtime.files import append, append_kept, cut_rows, replace_text, say, writing

# options that may differ on resume, because they do not affect the result
NEUTRAL = set('resume out_dir activation_checkpointing keep_last log_every save_every max_tokens compile wandb tensorboard tp '
              'device_map cpu_offload shard skip_bad_steps deterministic save_dtype reward_workers reward_timeout'.split())  # fmt: skip
# files and folders that a run writes to out_dir, besides config.json and .lock
WRITTEN = 'model adapter checkpoints metrics.jsonl samples.jsonl bad_step.jsonl latest wandb_id.txt'.split()
# metric -> short name on the screen
SHOWN = {'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
         'rewards/rejected': 'rejected', 'score': 'reward', 'gold': 'gold', 'kl/samples': 'kl', 'clipped': 'clipped',
         'explained_variance': 'ev', 'length': 'length', 'ended': 'ended'}  # fmt: skip


IS_LINK = '{} is a symbolic link, and a run would write through it: remove the link'


def check_names(out_dir):
    """Raise UserError for names in out_dir that a run writes to: symlinks, and files of an unknown run, without a config.json."""
    folder = Path(out_dir)
    has_config = (folder / 'config.json').exists()
    for name in ('.lock', 'config.json', *WRITTEN):
        # a run writes NAME.tmp first, and renames it
        for path in (folder / name, folder / f'{name}.tmp'):
            if path.is_symlink():
                raise UserError(IS_LINK.format(path))
            if name in WRITTEN and not has_config and path.exists():
                found = f'{out_dir} has {path.name}, but no config.json that says which run has written it'
                raise UserError(f'{found}: put that back, or choose another --out_dir')


def recorded(out_dir):
    """Return the run described by out_dir/config.json: a dict as for check_same().

    Returns None if config.json is missing, or if nothing else was written: then out_dir is free. Raises UserError if it is damaged."""
    file = Path(out_dir) / 'config.json'
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        script = Path(record.get('command', [''])[0]).name
        run = {'script': script, 'options': dict(record['config']), 'contents': dict(record.get('contents', {}))}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{file} is damaged, or not of a run: choose another --out_dir') from None
    other_files = set(os.listdir(out_dir)) - {'config.json', '.lock'}
    return run if other_files else None


def check_same(place, recorded_run, run, neutral=NEUTRAL):
    """Raise UserError if run differs from recorded_run; print a note if recorded_run lacks hashes to compare.

    A run is {'script': file name, 'options': {name: value}, 'contents': hashes}; hashes are {'model': {file: hash}, 'training
    examples': hash}, say. Ignored: options in neutral, those of recorded_run alone, those of run alone that are at their default.
    place: start of the message, such as 'FOLDER holds'; it names three differences, as in 'lr 1e-06 there and 5e-07 here'."""
    differences = []
    # '': an older version recorded no script
    if recorded_run['script'] not in ('', run['script']):
        differences.append(f'of {recorded_run["script"]} there and of {run["script"]} here')

    there = recorded_run['options']
    here = run['options']
    origin = getattr(here, 'origin', {})  # option -> where its value comes from, such as 'default'
    for name in here:
        # an option that is newer than the recorded run
        is_new_default = name not in there and origin.get(name) == 'default'
        if name not in neutral and not is_new_default and _in_full(here[name]) != _in_full(there.get(name)):
            differences.append(f'{name} {there.get(name)!r} there and {here[name]!r} here')

    for name, hashes in run['contents'].items():
        recorded_hashes = recorded_run['contents'].get(name, hashes)
        if recorded_hashes == hashes:
            continue
        difference = f'the {name} have changed since: their tokens, labels or order'
        if isinstance(hashes, dict):
            # the files of a model: name the first that differs; ^: (file, hash) of only one of the two
            file, _hash = min(recorded_hashes.items() ^ hashes.items())
            difference = f'{name} {here.get(name)!r} has changed since: {file}'
        differences.append(difference)

    if differences:
        advice = 'put back what it began with, or choose another --out_dir'
        raise UserError(f'{place} a different run ({", ".join(differences[:3])}): {advice}')
    unhashed = ', '.join(sorted(run['contents'].keys() - recorded_run['contents'].keys()))
    if unhashed:
        say(f'note: {place} a run of an older version, which kept no hash of {unhashed}: not checked')


def _in_full(value):
    """Return an option's value in which existing paths, also those in hh:PATH and A+B, are absolute: for comparison only."""
    if not isinstance(value, str):
        return value
    return re.sub('[^+:]+', lambda part: os.path.realpath(part[0]) if os.path.exists(part[0]) else part[0], value)


def check_out_dir(out_dir, config, resume, neutral=NEUTRAL):
    """Raise UserError if a run with these options cannot use out_dir, or if its tracker (wandb, tensorboard) is not installed.

    out_dir must be writable, and either new or of the same run: all options but neutral equal, unfinished, and resume on."""
    for name in ('wandb', 'tensorboard'):
        if config.get(name) and not importlib.util.find_spec(name):
            raise UserError(f'--{name} needs a package that is not installed: pip install {name}')
    folder = Path(out_dir)
    # sample.py and label.py append rows to these
    for path in (folder / 'samples.jsonl', folder / 'verdicts.jsonl'):
        if path.is_symlink():
            raise UserError(IS_LINK.format(path))
    # test the nearest existing folder for write access
    with writing(f'to out_dir {out_dir}'):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=nearest).close()
        recorded_run = recorded(out_dir)
    if not recorded_run:
        return
    # hashes are compared later, when models and data are loaded
    run = {'script': Path(sys.argv[0]).name, 'options': config, 'contents': {}}
    check_same(f'{out_dir} holds', recorded_run, run, neutral)
    is_finished = (folder / 'model').exists()
    if is_finished or not resume:
        state = 'finished' if is_finished else 'begun, and --resume is off'
        raise UserError(f'{out_dir} holds this run already ({state}): choose another --out_dir, or delete it')


def claim_out_dir(out_dir, config, contents=None):
    """Write out_dir/config.json: options, command, git commit, versions, and hashes of contents. Raises UserError."""
    # shell=True: if git is missing, the shell returns an exit code, where run() would raise
    git = subprocess.run('git rev-parse HEAD', shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {name: version(name) for name in ('torch', 'transformers')}
    record = {'config': dict(config), 'command': sys.argv, 'commit': git.stdout.strip(), 'versions': versions}
    if contents:
        record['contents'] = contents
    replace_text(Path(out_dir) / 'config.json', json.dumps(record, indent=1))


def _open_wandb(project, out_dir):
    """Start or resume the Weights & Biases run of out_dir, by the id in wandb_id.txt. Returns (write(row), close())."""
    import wandb

    id_file = out_dir / 'wandb_id.txt'
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex())
    # put the options on the same level as command, commit and versions
    record = json.loads((out_dir / 'config.json').read_text())
    options = record.pop('config') | record
    names = {'project': project, 'name': out_dir.resolve().name, 'id': id_file.read_text()}
    run = wandb.init(**names, dir=out_dir, resume='allow', config=options)
    return (lambda row: run.log(row, step=row['counters/examples'])), run.finish


def _open_tensorboard(out_dir, start):
    """Open a tensorboard file in out_dir. Returns (write(row), close()). start: examples seen before."""
    from torch.utils.tensorboard import SummaryWriter

    # a resumed run repeats the steps after its checkpoint: tell tensorboard to drop their old values
    purge_step = start + 1 if start else None
    writer = SummaryWriter(out_dir, purge_step=purge_step, flush_secs=10)

    def write(row):
        for name in row.keys() - {'split'}:
            writer.add_scalar(name, row[name], row['counters/examples'])

    return write, writer.close


def key_of(metric, split):
    """Return the key of a metric in a row: loss -> loss/train, rewards/margins -> rewards_train/margins."""
    group, slash, rest = metric.partition('/')
    return f'{group}_{split}/{rest}' if slash else f'{group}/{split}'


def cut_back(out_dir, start, evaluated):
    """Delete rows that a run will write again from the files of out_dir. Raises UserError for damaged files or a full disk.

    start: examples done before a resume, or 0; evaluated: examples at the last complete evaluation, or -1."""
    folder = Path(out_dir)
    cut_rows(folder / 'samples.jsonl', lambda row: row['examples'] <= evaluated)
    cut_rows(folder / 'bad_step.jsonl', lambda row: row['examples'] <= start)

    # whether to keep a row of metrics.jsonl. A new run keeps none, not even that of an evaluation at 0 examples
    def is_kept(row):
        last = evaluated if row['split'] == 'eval' else start
        return start > 0 and row['counters/examples'] <= last

    cut_rows(folder / 'metrics.jsonl', is_kept)


class Log:
    """Writes a row per step and evaluation to metrics.jsonl and the trackers, and a line to the screen. Rank 0 only."""

    def __init__(self, out_dir, total, start, every, wandb=None, tensorboard=False):
        """Open the logs and the trackers. wandb: project or None.

        total: examples of the run; start: those before a resume; every: examples between lines on the screen."""
        self.total, self.start, self.every = total, start, every
        self.began = time.perf_counter()
        if not main_rank():
            return
        folder = Path(out_dir)
        self.path = folder / 'metrics.jsonl'
        self.trackers = {}  # name -> (write(row), close()), or None if opening failed
        self.failed = set()  # names of trackers that have raised an error
        if wandb:
            self.trackers['wandb'] = self._attempt('wandb', _open_wandb, wandb, folder)
        if tensorboard:
            self.trackers['tensorboard'] = self._attempt('tensorboard', _open_tensorboard, folder, start)
        # the hook of configurator.py ends the process after an uncaught error: flush the trackers first
        hook_before = sys.excepthook

        def close_and_report(*error):
            self.close()
            hook_before(*error)

        sys.excepthook = close_and_report

    def _attempt(self, name, function, *args):
        """Call a tracker's function and return its result. On an error, print a note once, and return None."""
        try:
            return function(*args)
        except (Exception, SystemExit) as error:
            if name not in self.failed:
                lines = str(error).splitlines() or [type(error).__name__]
                key = os.environ.get('WANDB_API_KEY')  # a message may quote it
                reason = lines[0].replace(key, '...') if key else lines[0]
                say(f'note: {name} failed ({reason[:200]}): rows may be missing there; {self.path} has all of them')
            self.failed.add(name)
            return None

    def row(self, split, examples, metrics):
        """Write a row of metrics (name -> number). split: 'train', 'eval', or 'check' (before the first step).

        Prints the metrics in SHOWN of evaluations, and of steps that cross a multiple of self.every examples."""
        if not main_rank():
            return
        row = {'split': split, 'counters/examples': examples}
        # leave NaN and infinity out, which JSON has not
        row |= {name: value for name, value in metrics.items() if math.isfinite(value)}
        append(self.path, json.dumps(row, default=float) + '\n')  # float: of tensors
        # failed names trackers that could not be opened, too
        for name in self.trackers.keys() - self.failed:
            write, _close = self.trackers[name]
            self._attempt(name, write, row)
        before_step = examples - metrics.get('counters/step_examples', 0)
        is_due = examples // self.every > before_step // self.every
        if split != 'eval' and not is_due:
            return

        parts = [f'{split:5s} {examples:>7d}/{self.total}']
        for metric, short_name in SHOWN.items():
            key = key_of(metric, split)  # loss -> loss/train
            if key in row:
                parts.append(f'{short_name} {row[key]:.4g}')
        if split == 'train':
            seconds_each = (time.perf_counter() - self.began) / max(1, examples - self.start)
            left = max(0, int(seconds_each * (self.total - examples)))  # seconds
            grad = row.get('grad_norm', math.nan)
            speed = row.get('examples_per_second', math.nan)
            parts.append(f'grad {grad:.3g}  {speed:.1f} ex/s  {left // 60}:{left % 60:02d} left')
        say('  '.join(parts))

    def close(self):
        """Write the rows that wait in memory and close the trackers, which os._exit would not do. Idempotent."""
        if not main_rank():
            return
        try:
            append_kept()
        except UserError as error:
            # such as: cannot write FILE: rows that wait for room: 3
            say(f'warning: {error}, and are lost')
        while self.trackers:
            name, functions = self.trackers.popitem()
            if functions:  # None: opening failed
                _write, close = functions
                self._attempt(name, close)


def progress(total, unit, description, **options):
    """Return a tqdm progress bar for the main rank. If stderr is not a terminal, it prints a line every 30 seconds.

    total: number of items, or None if unknown; unit: with a leading space, such as ' rows'; options: passed to tqdm."""
    from tqdm import tqdm

    options = {'total': total, 'unit': unit, 'desc': description, 'disable': not main_rank()} | options
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, leave=False, **options)

    # tqdm redraws its bar by a carriage return and padding: in a file, write plain lines instead
    def write_line(text):
        if text.strip():
            sys.stderr.write(f'{text.strip()}\n')

    file = SimpleNamespace(write=write_line, flush=sys.stderr.flush)
    of_total = '{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}'
    bar_format = of_total if total else '{desc}: {n_fmt}{unit}, {rate_fmt}'
    return tqdm(file=file, mininterval=30, delay=30, bar_format=bar_format, **options)


def speeds(n, tokens, elapsed, **parts):
    """Return the metrics of a step or round of n examples and so many tokens on size and speed. elapsed: the seconds that it took.

    parts: metric -> how many of these went into something, such as waiting for data; logged as a share."""
    amounts = {'examples_per_second': n, 'tokens_per_second': tokens} | parts
    rates = {name: per_second(amount, elapsed) for name, amount in amounts.items()}
    return {'counters/step_examples': n} | rates


def per_second(amount, seconds):
    """Return amount / seconds, or NaN, which Log.row() drops, if seconds is not positive (a clock that stands still)."""
    return amount / seconds if seconds > 0 else math.nan


def warmup_steps(config, n_steps):
    """Return the number of warm-up steps of a run of n_steps: the option, but if left at its default at most a tenth."""
    wanted = config.warmup_steps
    tenth = n_steps // 10
    is_default = config.origin['warmup_steps'] == 'default'
    if not is_default and wanted >= max(1, n_steps):
        never = f'the learning rate never reaches {config.lr}'
        say(f'note: warmup_steps={wanted}, and the run has {n_steps} step{"s" * (n_steps != 1)}: {never}')
    if not is_default or wanted <= tenth:
        return wanted
    say(f'note: warm-up takes a tenth of this short run ({tenth} / {n_steps} steps), in place of warmup_steps={wanted}')
    return tenth


def schedule(step, steps, warmup, shape):
    """Return the factor, 0 to 1, of the learning rate in a step (0 to steps - 1): linear warmup, then decay.

    warmup: number of warmup steps; shape: 'constant', or 'linear' or 'cosine' decay to zero."""
    # share of the steps after the warmup that remain: 1 at the end of the warmup, 0 after the last step
    remaining = min(1.0, max(0.0, (steps - step) / max(1, steps - warmup)))
    cosine = (1 - math.cos(math.pi * remaining)) / 2
    decay = {'constant': 1.0, 'linear': remaining, 'cosine': cosine}[shape]
    # + 1: the first step has a rate above 0
    rising = (step + 1) / (warmup + 1)
    return min(1.0, rising, decay)
