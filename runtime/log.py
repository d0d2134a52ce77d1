"""Where a run leaves its traces: out_dir/config.json, metrics.jsonl, the screen, and wandb or tensorboard if asked."""

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configurator import UserError, main_rank
from runtime.files import append, cut_rows, give_up_kept, replace_text, say, writing  # noqa: F401, say is for others

# options that may differ when a run is continued: they change neither the result nor what is compared
NEUTRAL = set('resume out_dir activation_checkpointing keep_last log_every save_every max_tokens compile wandb tensorboard tp '
              'device_map cpu_offload shard skip_bad_steps deterministic save_dtype reward_workers reward_timeout'.split())  # fmt: skip
# what a run puts into its out_dir, beside config.json, .lock and checkpoints
WRITTEN = ('model', 'adapter', 'metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl', 'latest', 'wandb_id.txt')
# metrics on the screen, and their names there
SHOWN = {'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
         'rewards/rejected': 'rejected', 'score': 'reward', 'gold': 'gold', 'kl/samples': 'kl', 'clipped': 'clipped',
         'explained_variance': 'ev', 'length': 'length', 'ended': 'ended'}  # fmt: skip


def check_names(out_dir, resume):
    """Raise UserError where out_dir has files under the names of a run's, which no run has put there.

    Nor may they be links: what is written through one lands elsewhere. out_dir may be one. resume: where there are checkpoints,
    they say themselves which run they are of (checkpoint.latest)."""
    folder = Path(out_dir)
    ours = [*WRITTEN, *(f'{name}.tmp' for name in WRITTEN)]
    for name in ('config.json', 'config.json.tmp', '.lock', 'checkpoints', *ours):
        if (folder / name).is_symlink():
            raise UserError(f'{folder / name} is a symbolic link, and a run would write through it: remove the link')
    if (folder / 'config.json').exists():
        return
    # without config.json only checkpoints can tell
    numbered = any(folder.glob('checkpoints/[0-9]*/'))
    names = ['model'] if resume and numbered else ours + ['checkpoints'] * numbered
    foreign = [name for name in names if (folder / name).exists()]
    if foreign:
        what = f'{out_dir} has {foreign[0]}, but no config.json that says which run has written it'
        raise UserError(f'{what}: choose another --out_dir, or move it away')


def recorded(out_dir):
    """The run that out_dir/config.json is of: script (where it is known), options, contents; None without such a file."""
    file = Path(out_dir) / 'config.json'
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        run = {'options': dict(record['config']), 'contents': dict(record.get('contents', {}))}
        if 'command' in record:
            run['script'] = Path(record['command'][0]).name
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{file} is damaged: choose another --out_dir, or delete it') from None
    return run


def differences(before, run, neutral=NEUTRAL):
    """How a run differs from the one before, as words. Both have script, options and contents, as in checkpoint.identify.

    What an older version did not write down counts as the same; an option that it did not have, as its default."""
    words = []
    script = before.get('script', run['script'])
    if script != run['script']:
        words.append(f'of {script} there and of {run["script"]} here')

    origin = getattr(run['options'], 'origin', {})
    for name, value in run['options'].items():
        there = before['options'].get(name)
        added = name not in before['options'] and origin.get(name) == 'default'
        if name not in neutral and not added and there != value:
            words.append(f'{name} {there!r} there and {value!r} here')

    for name, content in run['contents'].items():
        there = before['contents'].get(name, content)
        if there == content:
            continue
        if isinstance(content, dict):
            # a model: its files
            there = there if isinstance(there, dict) else {}
            files = sorted(file for file in there.keys() | content.keys() if there.get(file) != content.get(file))
            words.append(f'{name} {run["options"].get(name)!r} has changed since: {files[0]}')
        else:
            words.append(f'the {name} have changed since: their tokens, labels or order')
    return words


def check_out_dir(out_dir, config, resume, neutral=NEUTRAL):
    """Raise UserError where out_dir holds a different run, or cannot be written, or what the run is logged to is missing.
    neutral: options that may differ."""
    check_trackers(config.get('wandb'), config.get('tensorboard'))
    folder = Path(out_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for path in made:  # a run that fails before its first step leaves nothing behind
            path.rmdir()
        before = recorded(out_dir)
    except OSError as error:
        raise UserError(f'cannot write to out_dir {out_dir}: {error.strerror}') from None
    if before is None:
        return
    changed = differences(before, {'script': Path(sys.argv[0]).name, 'options': config, 'contents': {}}, neutral)
    if changed:
        what = ', '.join(changed[:3])
        raise UserError(f'{out_dir} holds a different run ({what}): choose another --out_dir, or delete it')
    finished = (folder / 'model').exists()
    if finished or not resume:
        done = 'finished' if finished else 'begun, and --resume is off'
        raise UserError(f'{out_dir} holds this run already ({done}): choose another --out_dir, or delete it')


def claim_out_dir(out_dir, config, contents=None):
    """Write config.json, now that the run is about to begin: options, command, commit, versions, and the hashes of models and
    data (contents of checkpoint.identify)."""
    import torch
    import transformers

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
    record = {'config': dict(config), 'command': sys.argv, 'commit': git.stdout.strip()}
    record['versions'] = {'torch': torch.__version__, 'transformers': transformers.__version__}
    record |= {'contents': contents} if contents is not None else {}
    replace_text(Path(out_dir) / 'config.json', json.dumps(record, indent=1))


def check_trackers(wandb, tensorboard):
    """Raise UserError now, not after minutes of loading, where wandb or tensorboard is asked for and does not work."""
    hints = {'wandb': 'set WANDB_API_KEY, or WANDB_MODE=offline', 'tensorboard': 'install it anew, or leave it out'}
    modules = {'wandb': wandb and 'wandb', 'tensorboard': tensorboard and 'torch.utils.tensorboard'}
    for name, module in modules.items():
        try:
            tool = module and importlib.import_module(module)
            if module == 'wandb' and os.environ.get('WANDB_MODE', 'online') == 'online':
                tool.login()
        except ImportError:
            raise UserError(f'--{name} needs a package that is not installed: pip install {name}') from None
        except (Exception, SystemExit) as error:  # such as packages that do not suit each other
            raise UserError(f'--{name} fails ({_reason(error)}): {hints[name]}') from None


def _reason(error):
    """What an error of somebody else's code says, in one line, without the key of Weights & Biases."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    key = os.environ.get('WANDB_API_KEY')
    return (reason.replace(key, '...') if key else reason)[:200]


def _open_wandb(project, out_dir):
    """(write a row, close) of the run of this out_dir: its id is kept there, so that a resumed run goes on in the same one."""
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
        for name, value in row.items():
            if name != 'split':
                writer.add_scalar(name, value, row['counters/examples'])

    return write, writer.close


class Log:
    """On rank 0: metrics.jsonl (a row a step, a row an evaluation), a progress bar, and one line a row on the screen."""

    def __init__(self, out_dir, total, start, every, wandb=None, tensorboard=False, evaluated=None):
        """total: examples of the run; start: those before it; every: a line on the screen after so many; evaluated: examples at
        the last evaluation that was complete."""
        from tqdm import tqdm

        self.total, self.every, self.began, self.start = total, every, time.time(), start
        if not main_rank():
            return
        # rows that a resumed run will write again go
        folder = Path(out_dir)
        self.path = folder / 'metrics.jsonl'
        evaluated = start if evaluated is None else evaluated
        seen = {'eval': evaluated}
        cut_rows(folder / 'samples.jsonl', lambda row: start and row['examples'] <= evaluated)
        cut_rows(folder / 'bad_step.jsonl', lambda row: row['examples'] <= start)
        cut_rows(self.path, lambda row: start and row['counters/examples'] <= seen.get(row['split'], start))
        with writing(self.path):
            self.path.touch()

        # a file gets the lines alone
        self.bar = tqdm(total=total, initial=start, unit='ex', disable=None, dynamic_ncols=True)
        # name of a tracker -> what writes a row; what closes it
        self.writers, self.closers, self.failed = {}, {}, set()
        if wandb:
            self._attempt('wandb', self._open, 'wandb', _open_wandb, wandb, folder)
        if tensorboard:
            self._attempt('tensorboard', self._open, 'tensorboard', _open_tensorboard, out_dir, start)
        # else an error would cost what they have not written yet
        before = sys.excepthook
        sys.excepthook = lambda *error: (self.close(), before(*error))

    def _open(self, name, opener, *args):
        self.writers[name], self.closers[name] = opener(*args)

    def _attempt(self, name, fn, *args):
        """Call a tracker. Where it fails, whatever it raises, it gets no more rows, and the run goes on without it."""
        try:
            fn(*args)
        except (Exception, SystemExit) as error:
            self.writers.pop(name, None)
            if name not in self.failed:
                where = f'rows may be missing there; {self.path} has all of them'
                self.say(f'note: {name} failed ({_reason(error)}): {where}')
            self.failed.add(name)

    def row(self, split, examples, metrics):
        """Write metrics (name -> number) after so many examples; an evaluation and every log_every examples on screen."""
        if not main_rank():
            return
        metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}  # json knows no others; see bad_step.jsonl
        row = {'split': split, 'counters/examples': examples, **metrics}
        append(self.path, json.dumps(row) + '\n')
        for name, write in list(self.writers.items()):
            self._attempt(name, write, row)
        self.bar.update(examples - self.bar.n)
        before = examples - metrics.get('counters/step_examples', 0)
        if split == 'eval' or examples // self.every > before // self.every:
            self.say(self.line(row))

    def line(self, row):
        """One readable line: example count, the few numbers to watch, speed, time left."""
        split, examples = row['split'], row['counters/examples']
        parts = [f'{split:5s} {examples:>7d}/{self.total}']
        for name, short in SHOWN.items():
            # rewards/margins of the training rows is rewards_train/margins, loss is loss/train
            group, _, rest = name.partition('/')
            key = f'{group}_{split}/{rest}' if rest else f'{group}/{split}'
            parts += [f'{short} {row[key]:.4g}'] if key in row else []
        if split == 'train':
            passed = max(0.0, time.time() - self.began)  # a clock may be set back
            left = int(passed / max(1, examples - self.start) * (self.total - examples))
            speed = row.get('examples_per_second', math.nan)
            parts += [f'grad {row.get("grad_norm", math.nan):.3g}  {speed:.1f} ex/s  {left // 60}:{left % 60:02d} left']
        return '  '.join(parts)

    def say(self, text):
        """Print above the progress bar."""
        if main_rank():
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        """End the progress bar and the trackers: the process ends without the clean-up that would flush them."""
        if main_rank():
            self.bar.close()
            give_up_kept()
            while self.closers:
                self._attempt(*self.closers.popitem())


class _Lines:
    """A stream for tqdm that makes a line of each bar."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + '\n')

    def flush(self):
        sys.stderr.flush()


def progress(total, unit, what, **options):
    """A tqdm of the main rank: a bar on a terminal, a line every half minute in a file. options: further ones of tqdm."""
    from tqdm import tqdm

    options = {'total': total, 'unit': unit, 'desc': what, 'disable': not main_rank()} | options
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, leave=False, **options)
    shown = (
        '{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}'
        if total
        else '{desc}: {n_fmt}{unit}, {rate_fmt}'
    )
    return tqdm(file=_Lines(), mininterval=30, delay=30, bar_format=shown, **options)


def per_second(amount, seconds):
    """The rate; NaN, which Log.row leaves out, where the clock stood still or was set back."""
    return amount / seconds if seconds > 0 else math.nan


def schedule(step, steps, warmup, shape):
    """Factor of the learning rate at a step: linear warm-up, then constant, linear or cosine to zero."""
    left = min(1.0, max(0.0, (steps - step) / max(1, steps - warmup)))
    shapes = {'constant': 1.0, 'linear': left, 'cosine': (1 - math.cos(math.pi * left)) / 2}
    return min(1.0, (step + 1) / (warmup + 1), shapes[shape])
