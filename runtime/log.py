"""The logs of a run: out_dir/config.json, metrics.jsonl, lines on the screen, and optionally wandb or tensorboard.

check_out_dir() protects out_dir from other runs, before anything is loaded. claim_out_dir() writes config.json when training
starts. Then Log writes a row for each step and evaluation."""

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
from runtime.files import append, append_kept, check_file, cut_rows, read_json, replace_text, say, writing
from text.examples import counted

# options that may differ on resume, because they do not affect the result
NEUTRAL = set('resume out_dir activation_checkpointing keep_last log_every save_every max_tokens compile wandb tensorboard tp '
              'device_map cpu_offload shard skip_bad_steps deterministic save_dtype reward_workers reward_timeout'.split())  # fmt: skip
RUN = {'script': str, 'options': dict, 'contents': dict}  # fields of a run, as check_same() compares it
# files and folders that a run writes to out_dir, besides config.json and .lock
WRITTEN = 'model adapter checkpoints metrics.jsonl samples.jsonl bad_step.jsonl latest wandb_id.txt'.split()
# metric -> short name on the screen
SHOWN = {'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
         'rewards/rejected': 'rejected', 'score': 'reward', 'gold': 'gold', 'kl/samples': 'kl', 'clipped': 'clipped',
         'explained_variance': 'ev', 'length': 'length', 'ended': 'ended'}  # fmt: skip


def check_names(out_dir, written):
    """Raise UserError if a file that a run would write (written) in out_dir is a symlink, or lies there without its config.json."""
    folder = Path(out_dir)
    has_config = (folder / 'config.json').exists()
    for name in ('.lock', 'config.json', *written):
        # a run writes NAME.tmp first, and renames it
        for path in (folder / name, folder / f'{name}.tmp'):
            if not path.is_dir():
                check_file(path)
            if path.is_symlink():
                raise UserError(f'{path} is a symbolic link, and a run would write through it: remove the link')
            if name in written and not has_config and path.exists():
                found = f'{out_dir} has {path.name}, but no config.json that says which run has written it'
                raise UserError(f'{found}: put that back, or choose another --out_dir')


def recorded(out_dir):
    """Return the run in config.json, as for check_same(), or None if out_dir has no config.json, or only that. UserError if damaged."""
    file = Path(out_dir) / 'config.json'
    if not file.exists():
        return None

    def run_of(record):
        script = Path(record.get('command', [''])[0]).name
        return {'script': script, 'options': dict(record['config']), 'contents': dict(record.get('contents', {}))}

    run = read_json(file, run_of, 'choose another out_dir, for it may be of something else than a run')
    other_files = set(os.listdir(out_dir)) - {'config.json', '.lock'}
    return run if other_files else None


def check_same(subject, recorded_run, run, neutral=NEUTRAL):
    """Raise UserError if run differs from recorded_run; print a note if recorded_run lacks hashes to compare.

    A run is {'script': file name, 'options': {name: value}, 'contents': {'model': {file: hash}, 'training examples': hash, ...}}.
    neutral: names of options that may differ. subject: how messages begin, such as 'FOLDER holds'."""
    found = _differences(recorded_run, run, neutral)
    if found:
        advice = 'put back what it began with, or choose another --out_dir'
        raise UserError(f'{subject} a different run ({", ".join(found[:3])}): {advice}')
    unhashed = ', '.join(sorted(run['contents'].keys() - recorded_run['contents'].keys()))
    if unhashed:
        say(f'note: {subject} a run of an older version, which kept no hash of {unhashed}: not checked')


def _differences(recorded_run, run, neutral):
    """Return the differences of two runs as phrases, such as 'lr 1e-06 there and 5e-07 here'. Arguments: see check_same()."""
    found = []
    # '': an older version recorded no script
    if recorded_run['script'] not in ('', run['script']):
        found.append(f'of {recorded_run["script"]} there and of {run["script"]} here')

    there = recorded_run['options']
    here = run['options']
    origin = getattr(here, 'origin', {})  # option -> where its value comes from, such as 'default'
    for name in here:
        # an option that is newer than the recorded run
        is_new_default = name not in there and origin.get(name) == 'default'
        if name not in neutral and not is_new_default and _in_full(here[name]) != _in_full(there.get(name)):
            found.append(f'{name} {there.get(name)!r} there and {here[name]!r} here')

    for name, hashes in run['contents'].items():
        # hashes that an older version did not record count as equal
        recorded_hashes = recorded_run['contents'].get(name, hashes)
        if recorded_hashes == hashes:
            continue
        # the files of a model, each with its hash
        if isinstance(hashes, dict) and isinstance(recorded_hashes, dict):
            changed = []
            for file in recorded_hashes | hashes:
                if recorded_hashes.get(file) != hashes.get(file):
                    changed.append(file)
            found.append(f'{name} {here.get(name)!r} has changed since: {min(changed)}')
        else:
            found.append(f'the {name} have changed since: their tokens, labels or order')
    return found


def _in_full(value):
    """Return an option's value in which existing paths, also those in hh:PATH and A+B, are absolute: for comparison only."""
    if not isinstance(value, str):
        return value
    parts = re.split('([+:])', value)  # with the separators
    for i, part in enumerate(parts):
        if os.path.exists(part):
            parts[i] = os.path.realpath(part)
    return ''.join(parts)


def check_out_dir(out_dir, config, resume, neutral=NEUTRAL, written=WRITTEN):
    """Raise UserError if a run with these options cannot use out_dir, or if its tracker (wandb, tensorboard) is not installed.

    out_dir must be writable, and new or of the same run, unfinished, with resume on. neutral: options that may differ."""
    for name in ('wandb', 'tensorboard'):
        if config.get(name) and not importlib.util.find_spec(name):
            raise UserError(f'--{name} needs a package that is not installed: pip install {name}')
    folder = Path(out_dir)
    with writing(f'to out_dir {out_dir}'):
        # out_dir may have to be made: try to write to the nearest folder that exists
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=nearest).close()
        recorded_run = recorded(out_dir)
    check_names(out_dir, written)
    if not recorded_run:
        return
    # no contents: their hashes are compared later, when models and data are loaded
    run = {'script': Path(sys.argv[0]).name, 'options': config, 'contents': {}}
    check_same(f'{out_dir} holds', recorded_run, run, neutral)
    is_finished = (folder / 'model').exists()
    if is_finished or not resume:
        state = 'finished' if is_finished else 'begun, and --resume is off'
        raise UserError(f'{out_dir} holds this run already ({state}): choose another --out_dir, or delete it')


def claim_out_dir(out_dir, config, contents=None):
    """Write out_dir/config.json: options, command, git commit, versions, contents (hashes of models and data). Raises UserError."""
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
    """Delete rows that a run will write again. start: examples before a resume, or 0; evaluated: at the last evaluation, or -1."""
    folder = Path(out_dir)
    # evaluations write samples, training steps write bad_step.jsonl, and both write metrics
    cut_rows(folder / 'samples.jsonl', lambda row: row['examples'] <= evaluated)
    cut_rows(folder / 'bad_step.jsonl', lambda row: row['examples'] <= start)

    def is_kept(row):
        last = evaluated if row['split'] == 'eval' else start
        # a new run keeps none, not even that of an evaluation at 0 examples
        return start > 0 and row['counters/examples'] <= last

    cut_rows(folder / 'metrics.jsonl', is_kept)


def say_start(run, method, units, newest):
    """Print 'training dpo on 2 ranks: 320 examples (2 epochs), 64 a step'. newest: the checkpoint from which it goes on, or None."""
    action = f'{"resuming" if run.seen else "training"} {method}'.strip()
    n_epochs = run.total / len(run.train)
    epochs = f' ({round(n_epochs, 2):g} epochs)' if n_epochs > 1 else ''
    units = units or f'examples{epochs}, {run.config.batch_size} a step'
    # world_size counts the ranks with examples of their own: --tp of them share theirs
    processes = counted(run.world_size * run.config.tp, 'ranks')
    done = f'; going on after {run.seen:,} of them, from {newest}' if run.seen else ''
    say(f'{action} on {processes}: {counted(run.total, units)}{done}')


class Log:
    """Writes a row per step and evaluation to metrics.jsonl and the trackers, and a line to the screen. Rank 0 only."""

    def __init__(self, out_dir, total, start, every, wandb=None, tensorboard=False):
        """Open the logs and the trackers. total, start, every: numbers of examples. wandb: project or None."""
        self.total = total  # of the run
        self.start = start  # before a resume
        self.every = every  # between lines on the screen
        self.began = time.perf_counter()
        if not main_rank():
            return
        folder = Path(out_dir)
        self.path = folder / 'metrics.jsonl'
        self.failed = set()  # names of trackers that have raised an error
        opened = {}
        if wandb:
            opened['wandb'] = self._attempt('wandb', _open_wandb, wandb, folder)
        if tensorboard:
            opened['tensorboard'] = self._attempt('tensorboard', _open_tensorboard, folder, start)
        # name -> (write(row), close()) of the trackers that could be opened
        self.trackers = {name: functions for name, functions in opened.items() if functions}
        # after an uncaught error the hook, errors.report(), ends the process: close the trackers first
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

    def row(self, split, seen, metrics):
        """Write a row of metrics, {key such as loss/train: number}, after `seen` examples. Print it if it is of an evaluation or due.

        split: 'train', 'eval', or 'check' (before the first step). A step is due if it crosses a multiple of self.every examples."""
        if not main_rank():
            return
        row = {'split': split, 'counters/examples': seen}
        # leave NaN and infinity out, which JSON has not
        row |= {key: value for key, value in metrics.items() if math.isfinite(value)}
        append(self.path, json.dumps(row, default=float) + '\n')  # default: for tensors
        for name in self.trackers.keys() - self.failed:
            write, _close = self.trackers[name]
            self._attempt(name, write, row)
        if seen == self.start:
            self.began = time.perf_counter()  # the first evaluation tells nothing of the time that steps take
        before_step = seen - metrics.get('counters/step_examples', 0)
        is_due = seen // self.every > before_step // self.every
        if split != 'eval' and not is_due:
            return

        # print those metrics that are in SHOWN, and for a training step its speed and the time left
        parts = [f'{split:5s} {seen:>7d}/{self.total}']
        for metric, short_name in SHOWN.items():
            key = key_of(metric, split)  # loss -> loss/train
            if key in row:
                parts.append(f'{short_name} {row[key]:.4g}')
        if split == 'train':
            seconds_each = (time.perf_counter() - self.began) / max(1, seen - self.start)
            minutes, seconds = divmod(max(0, int(seconds_each * (self.total - seen))), 60)
            grad = row.get('grad_norm', math.nan)
            speed = row.get('examples_per_second', math.nan)
            parts.append(f'grad {grad:.3g}  {speed:.1f} ex/s  {minutes}:{seconds:02d} left')
        say('  '.join(parts))

    def close(self):
        """Write the rows that wait in memory and close the trackers, which os._exit would not do. Idempotent."""
        if not main_rank():
            return
        try:
            append_kept()
        except UserError as error:
            # the sentence ends in: rows that wait for room: 3
            say(f'warning: {error}, and are lost')
        while self.trackers:
            name, (_write, close) = self.trackers.popitem()
            self._attempt(name, close)


def progress(total, unit, description, **options):
    """Return a tqdm progress bar; in a file it is a line every 30 seconds. total: may be None; unit: such as ' rows'."""
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


def speeds(n, n_tokens, elapsed, **seconds):
    """Return a step's metrics of size and speed. seconds: metric -> how many of the elapsed seconds it took: 2.0 of 8 is logged as 0.25."""
    amounts = {'examples_per_second': n, 'tokens_per_second': n_tokens} | seconds
    rates = {name: per_second(amount, elapsed) for name, amount in amounts.items()}
    return {'counters/step_examples': n} | rates


def per_second(amount, seconds):
    """Return amount / seconds, or NaN, which Log.row() drops, if seconds is not positive (a clock that stands still)."""
    return amount / seconds if seconds > 0 else math.nan


def warmup_steps(config, n_steps):
    """Return the number of warm-up steps: the option warmup_steps, or at most a tenth of n_steps if nobody has set it."""
    wanted = config.warmup_steps
    tenth = n_steps // 10
    if config.origin['warmup_steps'] != 'default':
        if wanted >= max(1, n_steps):
            never = f'the learning rate never reaches {config.lr}'
            say(f'note: warmup_steps={wanted}, and the run has {n_steps} step{"s" * (n_steps != 1)}: {never}')
        return wanted
    if wanted > tenth:
        say(f'note: warm-up takes a tenth of this short run, {tenth} of {n_steps} steps, not warmup_steps={wanted}')
    return min(wanted, tenth)


def schedule(step, steps, warmup, shape):
    """Return the learning rate's factor in a step, 0 to steps - 1. shape after the warmup: constant, or linear or cosine decay to 0."""
    # share of the steps after the warmup that remain: 1 at the end of the warmup, 0 after the last step
    remaining = min(1.0, max(0.0, (steps - step) / max(1, steps - warmup)))
    cosine = (1 - math.cos(math.pi * remaining)) / 2
    decay = {'constant': 1.0, 'linear': remaining, 'cosine': cosine}[shape]
    # + 1: the first step has a rate above 0
    rising = (step + 1) / (warmup + 1)
    return min(1.0, rising, decay)
