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
from runtime.files import append, cut_rows, give_up_kept, replace_text, say, writing

# options that may differ when a run is continued: they change neither the result nor what is compared
NEUTRAL = {'resume', 'out_dir', 'activation_checkpointing', 'keep_last', 'log_every', 'save_every', 'max_tokens', 'compile', 'wandb', 'tensorboard',
           'tp', 'device_map', 'cpu_offload', 'skip_bad_steps'}  # fmt: skip
# what a run puts into its out_dir, beside config.json, .lock and checkpoints
WRITTEN = ('model', 'adapter', 'metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl', 'latest', 'wandb_id.txt')
SHOWN = {'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
         'rewards/rejected': 'rejected', 'score': 'reward',
         'gold': 'gold', 'kl/samples': 'kl', 'clipped': 'clipped', 'explained_variance': 'ev', 'length': 'length', 'ended': 'ended'}  # fmt: skip


def check_names(out_dir, resume):
    """Raise UserError where out_dir has files under the names of a run's, which no run has put there.

    Nor may they be links: what is written through one lands elsewhere. out_dir may be one. resume: where there are checkpoints,
    they say themselves which run they are of (checkpoint.latest)."""
    folder, temporary = Path(out_dir), [f'{name}.tmp' for name in WRITTEN]
    for name in ('config.json', 'config.json.tmp', '.lock', 'checkpoints', *WRITTEN, *temporary):
        if (folder / name).is_symlink():
            raise UserError(f'{folder / name} is a symbolic link, and a run would write through it: remove the link, or choose '
                            'another --out_dir (which may be a link)')  # fmt: skip
    if (folder / 'config.json').exists():
        return
    numbered = list(folder.glob('checkpoints/[0-9]*/'))
    foreign = [name for name in (*WRITTEN, *temporary) if (folder / name).exists()]
    if resume and numbered:
        foreign = [name for name in foreign if name == 'model']
    elif numbered:
        foreign.append('checkpoints')
    if foreign:
        raise UserError(f'{out_dir} has {foreign[0]}, but no config.json that says which run has written it: choose another '
                        '--out_dir, or move it away')  # fmt: skip


def option_changes(before, config, neutral=NEUTRAL):
    """Which options had another value before, as words. One that an older version did not have counts as its default."""
    origin = getattr(config, 'origin', {})
    words = []
    for name, value in config.items():
        added = name not in before and origin.get(name) == 'default'
        if name not in neutral and not added and before.get(name) != value:
            words.append(f'{name} {before.get(name)!r} there and {value!r} here')
    return words


def content_changes(before, run):
    """Which models and data are not those of before, as words. before: contents, as checkpoint.identify has them."""
    words = []
    for name, content in run['contents'].items():
        if name not in before or before[name] == content:
            continue
        if isinstance(content, dict):
            there = before[name] if isinstance(before[name], dict) else {}
            files = sorted(k for k in there.keys() | content.keys() if there.get(k) != content.get(k))
            words.append(f'{name} {run["options"].get(name)!r} has changed since: {files[0]}')
        else:
            words.append(f'the {name} have changed since: their tokens, labels or order')
    return words


def check_out_dir(out_dir, config, resume, neutral=NEUTRAL):
    """Raise UserError where out_dir holds a different run, or cannot be written, or what the run is logged to is missing.
    neutral: options that may differ."""
    check_trackers(config.get('wandb'), config.get('tensorboard'))
    file = Path(out_dir) / 'config.json'
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
        for folder in made:  # a run that fails before its first step leaves nothing behind
            folder.rmdir()
        record = json.loads(file.read_text()) if file.exists() else None
        before = dict(record['config']) if file.exists() else None
        dict((record or {}).get('contents', {}))  # which checkpoint.latest compares
        script = Path((record or {}).get('command', sys.argv)[0]).name
    except OSError as error:
        raise UserError(f'cannot write to out_dir {out_dir}: {error.strerror}') from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{file} is damaged: choose another --out_dir, or delete it') from None
    changed = [] if before is None else option_changes(before, config, neutral)
    if script != Path(sys.argv[0]).name:
        changed.insert(0, f'of {script} there and of {Path(sys.argv[0]).name} here')
    if changed:
        what = ', '.join(changed[:3])
        raise UserError(f'{out_dir} holds a different run ({what}): choose another --out_dir, or delete it')
    finished = (file.parent / 'model').exists()
    if before is not None and (not resume or finished):
        done = 'finished' if finished else 'begun, and --resume is off'
        raise UserError(f'{out_dir} holds this run already ({done}): choose another --out_dir, or delete it')


def check_trackers(wandb, tensorboard):
    """Raise UserError now, not after minutes of loading, where wandb or tensorboard is asked for and does not work."""
    for name, module, wanted in (('wandb', 'wandb', wandb), ('tensorboard', 'torch.utils.tensorboard', tensorboard)):
        try:
            _ = wanted and importlib.import_module(module)
        except ImportError:
            raise UserError(f'--{name} needs a package that is not installed: pip install {name}') from None
        except Exception as error:  # packages that do not suit each other
            raise UserError(
                f'--{name}: its package fails ({_reason(error)}): install it anew, or leave it out'
            ) from None
    if wandb and os.environ.get('WANDB_MODE', 'online') == 'online':
        import wandb as tool

        try:
            tool.login()
        except (Exception, SystemExit) as error:
            raise UserError(f'--wandb: {_reason(error)} Or set WANDB_API_KEY, or WANDB_MODE=offline.') from None


def _reason(error):
    """What an error of somebody else's code says, in one line, without the key of Weights & Biases."""
    lines = str(error).splitlines() or [type(error).__name__]
    key = os.environ.get('WANDB_API_KEY')
    reason = lines[0].replace(key, '...') if key else lines[0]
    return reason[:200]


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


class Log:
    """On rank 0: metrics.jsonl (a row a step, a row an evaluation), a progress bar, and one line a row on the screen."""

    def __init__(self, out_dir, total, start, every, wandb=None, tensorboard=False, evaluated=None):
        from tqdm import tqdm

        self.total, self.every, self.began, self.start = total, every, time.time(), start
        self.sinks, self.closers, self.failed = {}, {}, set()  # by the name of the tracker
        if not main_rank():
            return
        evaluated = start if evaluated is None else evaluated  # examples at the last evaluation that was complete
        self.path = Path(out_dir) / 'metrics.jsonl'
        cut_rows(Path(out_dir) / 'samples.jsonl', lambda row: start and row['examples'] <= evaluated)
        cut_rows(Path(out_dir) / 'bad_step.jsonl', lambda row: row['examples'] <= start)
        last = {'eval': evaluated}
        cut_rows(self.path, lambda row: start and row['counters/examples'] <= last.get(row['split'], start))
        with writing(self.path):
            self.path.touch()
        slow = 0.5 if sys.stderr.isatty() else 20
        self.bar = tqdm(total=total, initial=start, unit='ex', mininterval=slow, dynamic_ncols=True)
        if wandb:
            self._attempt('wandb', self._open_wandb, wandb, Path(out_dir))
        if tensorboard:
            self._attempt('tensorboard', self._open_tensorboard, out_dir)
        before = sys.excepthook
        # else an error would cost what they have not written yet
        sys.excepthook = lambda *error: (self.close(), before(*error))

    def _attempt(self, name, fn, *args):
        """Call a tracker. Where it fails, whatever it raises, it gets no more rows, and the run goes on without it."""
        try:
            fn(*args)
        except (Exception, SystemExit) as error:
            self.sinks.pop(name, None)
            if name not in self.failed:
                self.say(
                    f'note: {name} failed ({_reason(error)}): rows may be missing there; {self.path} has all of them'
                )
            self.failed.add(name)

    def _open_wandb(self, project, out_dir):
        run = _wandb_run(project, out_dir)
        self.sinks['wandb'] = lambda row: run.log(row, step=row['counters/examples'])
        self.closers['wandb'] = run.finish

    def _open_tensorboard(self, out_dir):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: what is about to be done again after a resume is not shown twice
        writer = SummaryWriter(out_dir, purge_step=self.start + 1 if self.start else None, flush_secs=10)
        add = writer.add_scalar
        self.sinks['tensorboard'] = lambda row: [
            add(k, v, row['counters/examples']) for k, v in row.items() if k != 'split'
        ]
        self.closers['tensorboard'] = writer.close

    def row(self, split, examples, metrics):
        """Write metrics (name -> number) after so many examples; an evaluation and every log_every examples on screen."""
        if not main_rank():
            return
        metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}  # json knows no others; see bad_step.jsonl
        row = {'split': split, 'counters/examples': examples, **metrics}
        append(self.path, json.dumps(row) + '\n')
        for name, sink in list(self.sinks.items()):
            self._attempt(name, sink, row)
        self.bar.update(examples - self.bar.n)
        before = examples - metrics.get('counters/step_examples', 0)
        if split == 'eval' or examples // self.every > before // self.every:
            self.say(self.line(row))

    def line(self, row):
        """One readable line: example count, the few numbers to watch, speed, time left."""
        split, examples = row['split'], row['counters/examples']
        parts = [f'{split:5s} {examples:>7d}/{self.total}']
        for name, short in SHOWN.items():
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
        if main_rank():
            self.bar.close()
            give_up_kept()
            while self.closers:  # the process ends without the clean-up that would flush them
                self._attempt(*self.closers.popitem())


def _wandb_run(project, out_dir):
    """The run of this out_dir: its id is kept there, so that a resumed run goes on in the same one."""
    import wandb

    file = out_dir / 'wandb_id.txt'
    if not file.exists():
        file.write_text(os.urandom(4).hex())
    record = json.loads((out_dir / 'config.json').read_text())
    options = record.pop('config')
    return wandb.init(project=project, name=out_dir.resolve().name, dir=out_dir, id=file.read_text(), resume='allow',
                      config={**options, **record})  # fmt: skip


def per_second(amount, seconds):
    """The rate; NaN, which Log.row leaves out, where the clock stood still or was set back."""
    return amount / seconds if seconds > 0 else math.nan


def crossed(every, first, seen, total):
    """Whether the step from first to seen examples is one after which to do what is done every so many, but not at the end."""
    return every and seen < total and seen // every > first // every


def schedule(step, steps, warmup, shape):
    """Factor of the learning rate at a step: linear warm-up, then constant, linear or cosine to zero."""
    left = min(1.0, max(0.0, (steps - step) / max(1, steps - warmup)))
    shapes = {'constant': 1.0, 'linear': left, 'cosine': (1 - math.cos(math.pi * left)) / 2}
    return min(1.0, (step + 1) / (warmup + 1), shapes[shape])


def say_too_long(lengths, max_tokens):
    """Say how many examples are longer than a microbatch should be."""
    if count := int((lengths > max_tokens).sum()):
        say(
            f'note: {count} examples are longer than max_tokens={max_tokens} (the longest: {lengths.max()}): '
            'each gets a microbatch of its own'
        )
