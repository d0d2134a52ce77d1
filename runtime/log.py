"""Where a run leaves its traces: out_dir/config.json, metrics.jsonl, the screen, and wandb or tensorboard if asked."""

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
# what a run puts into its out_dir, beside config.json and .lock
WRITTEN = 'model adapter checkpoints metrics.jsonl samples.jsonl bad_step.jsonl latest wandb_id.txt'.split()
# metrics on the screen, and their names there
SHOWN = {'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
         'rewards/rejected': 'rejected', 'score': 'reward', 'gold': 'gold', 'kl/samples': 'kl', 'clipped': 'clipped',
         'explained_variance': 'ev', 'length': 'length', 'ended': 'ended'}  # fmt: skip


# ---- which run a folder is of ----


def check_names(out_dir):
    """Raise UserError where files with the names of a run's are links, or where no run has put them there."""
    folder = Path(out_dir)
    is_a_run = (folder / 'config.json').exists()
    for name in ('.lock', 'config.json', *WRITTEN):
        for file in (folder / name, folder / f'{name}.tmp'):
            if file.is_symlink():
                raise UserError(f'{file} is a symbolic link, and a run would write through it: remove the link')
            if name in WRITTEN and not is_a_run and file.exists():
                what = f'{out_dir} has {file.name}, but no config.json that says which run has written it'
                raise UserError(f'{what}: put that back, or choose another --out_dir')


def recorded(out_dir):
    """The run that out_dir/config.json is of: its script ('' if not known), options and contents. None without such a file, or
    where the run has ended before it left anything else."""
    file = Path(out_dir) / 'config.json'
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        script = Path(record.get('command', [''])[0]).name
        run = {'script': script, 'options': dict(record['config']), 'contents': dict(record.get('contents', {}))}
        return run if set(os.listdir(out_dir)) - {'config.json', '.lock'} else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{file} is damaged: choose another --out_dir, or delete it') from None


def differences(before, run, neutral=NEUTRAL):
    """How a run differs from the one before, as words. Both have script, options and contents, as in checkpoint.identify.

    What an older version did not write down counts as the same; an option that it did not have, as its default."""
    words, options = [], run['options']
    if before['script'] not in ('', run['script']):
        words.append(f'of {before["script"]} there and of {run["script"]} here')
    origin = getattr(options, 'origin', {})
    for name, value in options.items():
        there = before['options'].get(name)
        added = name not in before['options'] and origin.get(name) == 'default'
        if name not in neutral and not added and there != value:
            words.append(f'{name} {there!r} there and {value!r} here')
    for name, content in run['contents'].items():
        there = before['contents'].get(name, content)
        if there == content:
            continue
        # a model's files, or one hash of all examples
        if isinstance(content, dict):
            file, _ = min(there.items() ^ content.items())
            words.append(f'{name} {options.get(name)!r} has changed since: {file}')
        else:
            words.append(f'the {name} have changed since: their tokens, labels or order')
    return words


def check_same(what, before, run, neutral=NEUTRAL):
    """Raise UserError where before is another run than run. what: begins the sentence."""
    found = ', '.join(differences(before, run, neutral)[:3])
    if found:
        raise UserError(f'{what} a different run ({found}): put back what it began with, or choose another --out_dir')
    unknown = ', '.join(sorted(run['contents'].keys() - before['contents'].keys()))
    if unknown:
        say(f'note: {what} a run of an older version, which kept no hash of {unknown}: not checked')


def check_out_dir(out_dir, config, resume, neutral=NEUTRAL):
    """Raise UserError where out_dir holds a different run, or cannot be written, or what the run is logged to is missing.
    neutral: options that may differ."""
    for name in ('wandb', 'tensorboard'):
        if config.get(name) and not importlib.util.find_spec(name):
            raise UserError(f'--{name} needs a package that is not installed: pip install {name}')
    folder = Path(out_dir)
    with writing(f'to out_dir {out_dir}'):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=nearest).close()
        before = recorded(out_dir)
    if not before:
        return
    run = {'script': Path(sys.argv[0]).name, 'options': config, 'contents': {}}
    check_same(f'{out_dir} holds', before, run, neutral)
    finished = (folder / 'model').exists()
    if finished or not resume:
        done = 'finished' if finished else 'begun, and --resume is off'
        raise UserError(f'{out_dir} holds this run already ({done}): choose another --out_dir, or delete it')


def claim_out_dir(out_dir, config, contents=None):
    """Write config.json, now that the run is about to begin. contents: hashes of models and data, of checkpoint.identify."""
    # through a shell, to which a missing git is no exception
    git = subprocess.run('git rev-parse HEAD', shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    record = {'config': dict(config), 'command': sys.argv, 'commit': git.stdout.strip()}
    record['versions'] = {name: version(name) for name in ('torch', 'transformers')}
    if contents:
        record['contents'] = contents
    replace_text(Path(out_dir) / 'config.json', json.dumps(record, indent=1))


# ---- trackers ----


def _reason(error):
    """What an error of somebody else's code says, in one line, without the key of Weights & Biases."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    key = os.environ.get('WANDB_API_KEY')
    return (reason.replace(key, '...') if key else reason)[:200]


def _open_wandb(project, out_dir):
    """(write a row, close) of the run whose id is kept in out_dir, so that a resumed run goes on in the same one."""
    import wandb

    file = out_dir / 'wandb_id.txt'
    if not file.exists():
        file.write_text(os.urandom(4).hex())
    record = json.loads((out_dir / 'config.json').read_text())
    options = {**record.pop('config'), **record}
    names = {'project': project, 'name': out_dir.resolve().name, 'id': file.read_text()}
    run = wandb.init(**names, dir=out_dir, resume='allow', config=options)
    return lambda row: run.log(row, step=row['counters/examples']), run.finish


def _open_tensorboard(out_dir, start):
    """(write a row, close). start: examples seen; what is about to be done again after a resume is not shown twice."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out_dir, purge_step=start + 1 if start else None, flush_secs=10)

    def write(row):
        for name in row.keys() - {'split'}:
            writer.add_scalar(name, row[name], row['counters/examples'])

    return write, writer.close


# ---- rows ----


class Log:
    """On rank 0: metrics.jsonl (a row a step, a row an evaluation), one line a row on the screen, and trackers."""

    say = staticmethod(say)

    def __init__(self, out_dir, total, start, every, wandb=None, tensorboard=False, evaluated=-1):
        """total: examples of the run; start: those before it; every: a line on the screen after so many; evaluated: examples at
        the last evaluation that was complete."""
        self.total, self.every, self.began, self.start = total, every, time.time(), start
        if not main_rank():
            return
        # rows that a resumed run will write again go
        folder = Path(out_dir)
        self.path = folder / 'metrics.jsonl'
        seen = {'eval': evaluated}
        cut_rows(folder / 'samples.jsonl', lambda row: row['examples'] <= evaluated)
        cut_rows(folder / 'bad_step.jsonl', lambda row: row['examples'] <= start)
        cut_rows(self.path, lambda row: start and row['counters/examples'] <= seen.get(row['split'], start))

        # name -> (what writes a row, what closes it), or None
        self.failed, self.trackers = set(), {}
        if wandb:
            self.trackers['wandb'] = self._attempt('wandb', _open_wandb, wandb, folder)
        if tensorboard:
            self.trackers['tensorboard'] = self._attempt('tensorboard', _open_tensorboard, folder, start)
        # else an error would cost what they have not written yet
        before = sys.excepthook
        sys.excepthook = lambda *error: (self.close(), before(*error))

    def _attempt(self, name, fn, *args):
        """Call a tracker. Where it fails, whatever it raises, it gets no more rows, and the run goes on without it."""
        try:
            return fn(*args)
        except (Exception, SystemExit) as error:
            if name not in self.failed:
                where = f'rows may be missing there; {self.path} has all of them'
                say(f'note: {name} failed ({_reason(error)}): {where}')
            self.failed.add(name)

    def row(self, split, examples, metrics):
        """Write metrics (name -> number) after so many examples; an evaluation and every log_every examples on screen."""
        if not main_rank():
            return
        row = {'split': split, 'counters/examples': examples}
        row |= {name: value for name, value in metrics.items() if math.isfinite(value)}  # json knows no others
        append(self.path, json.dumps(row) + '\n')
        for name in self.trackers.keys() - self.failed:
            self._attempt(name, self.trackers[name][0], row)
        before = examples - metrics.get('counters/step_examples', 0)
        if split == 'eval' or examples // self.every > before // self.every:
            say(self.line(row))

    def line(self, row):
        """One readable line: example count, the few numbers to watch, speed, time left."""
        split, examples = row['split'], row['counters/examples']
        parts = [f'{split:5s} {examples:>7d}/{self.total}']
        for name, short in SHOWN.items():
            # rewards/margins of the training rows is rewards_train/margins, loss is loss/train
            group, slash, rest = name.partition('/')
            key = f'{group}_{split}/{rest}' if slash else f'{group}/{split}'
            if key in row:
                parts.append(f'{short} {row[key]:.4g}')
        if split == 'train':
            each = (time.time() - self.began) / max(1, examples - self.start)
            # a clock may be set back
            seconds = max(0, int(each * (self.total - examples)))
            grad, speed = row.get('grad_norm', math.nan), row.get('examples_per_second', math.nan)
            parts.append(f'grad {grad:.3g}  {speed:.1f} ex/s  {seconds // 60}:{seconds % 60:02d} left')
        return '  '.join(parts)

    def close(self):
        """Write what waits for room, and close the trackers: the process ends without the clean-up that would flush them."""
        if not main_rank():
            return
        try:
            append_kept()
        except UserError as error:
            say(f'warning: {error}, and are lost')
        while self.trackers:
            name, tracker = self.trackers.popitem()
            if tracker:
                self._attempt(name, tracker[1])


def progress(total, unit, what, **options):
    """A tqdm of the main rank: a bar on a terminal, a line every half minute in a file. options: further ones of tqdm."""
    from tqdm import tqdm

    options = {'total': total, 'unit': unit, 'desc': what, 'disable': not main_rank()} | options
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, leave=False, **options)
    # tqdm's own lines begin with a carriage return
    rest = ' of {total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}' if total else '{unit}, {rate_fmt}'
    lines = SimpleNamespace(flush=sys.stderr.flush)
    lines.write = lambda text: text.strip() and sys.stderr.write(text.strip() + '\n')
    return tqdm(file=lines, mininterval=30, delay=30, bar_format='{desc}: {n_fmt}' + rest, **options)


def per_second(amount, seconds):
    """The rate; NaN, which Log.row leaves out, where the clock stood still or was set back."""
    return amount / seconds if seconds > 0 else math.nan


def schedule(step, steps, warmup, shape):
    """Factor of the learning rate at a step: linear warm-up, then constant, linear or cosine to zero."""
    left = (steps - step) / max(1, steps - warmup)
    left = min(1.0, max(0.0, left))
    if shape == 'cosine':
        left = (1 - math.cos(math.pi * left)) / 2
    rising = (step + 1) / (warmup + 1)
    return min(1.0, rising, 1.0 if shape == 'constant' else left)
