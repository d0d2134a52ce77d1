"""Where a run leaves its traces: out_dir/config.json, metrics.jsonl, the screen, and wandb or tensorboard if asked."""

import contextlib
import errno
import importlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from configurator import UserError, main_rank

# options that may differ when a run is continued: they change neither the result nor what is compared
NEUTRAL = {'resume', 'out_dir', 'activation_checkpointing', 'keep_last', 'log_every', 'save_every', 'max_tokens', 'compile', 'wandb', 'tensorboard',
           'tp', 'device_map', 'cpu_offload', 'skip_bad_steps'}  # fmt: skip
SHOWN = {'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
         'rewards/rejected': 'rejected', 'score': 'reward',
         'gold': 'gold', 'kl/samples': 'kl', 'clipped': 'clipped', 'explained_variance': 'ev', 'length': 'length', 'ended': 'ended'}  # fmt: skip


@contextlib.contextmanager
def writing(path):
    """Raise UserError where what is done inside cannot be written: a full disk, no permission."""
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from None
    except Exception as error:  # safetensors wraps what the system says
        if 'os error' not in str(error):
            raise
        raise UserError(f'cannot write {path}: {" ".join(str(error).split())[:200]}') from None


_kept = {}  # path -> bytes that could not be appended to it yet
_one_at_a_time = threading.RLock()  # checkpoints are written in a thread


def append(path, text):
    """Append whole lines to a file. Where that fails, on a full disk, say so once, keep them, and append them with the next.

    What a run has learnt is worth more than its rows: these alone must not end it."""
    path = Path(path)
    with _one_at_a_time:
        before = _kept.pop(path, b'')
        rest = before + text.encode()
        try:
            # without a buffer, so that what a write has taken is known
            with open(path, 'ab', buffering=0) as file:
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError as error:
            _kept[path] = rest
            if not before:
                say(
                    f'warning: cannot write {path}: {error.strerror}: its rows are kept in memory until they can be written'
                )


def append_kept():
    """Append what could not be written until now. Raises UserError where it still cannot, and goes on keeping it."""
    for path in list(_kept):
        append(path, '')
        if path in _kept:
            raise UserError(f'cannot write {path}: {_kept[path].count(bytes([10]))} rows wait for room')


def sync(path):
    """Have a file, or the names in a folder, brought to the disk, so that it survives a machine that loses power."""
    if Path(path) in _kept:
        append(path, '')
        if Path(path) in _kept:
            raise OSError(errno.ENOSPC, f'{Path(path).name} cannot be written')
    if Path(path).exists():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_text(path, text):
    """Write a text file so that it holds either what was in it or all of the new text, whatever happens meanwhile."""
    temporary = Path(f'{path}.tmp')
    with writing(path):
        temporary.write_text(text)
        sync(temporary)
        temporary.replace(path)


def check_out_dir(out_dir, config, resume, neutral=NEUTRAL):
    """Raise UserError where out_dir holds a different run, or cannot be written, or what the run is logged to is missing.
    neutral: options that may differ."""
    check_trackers(config.get('wandb'), config.get('tensorboard'))
    file = Path(out_dir) / 'config.json'
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / '.write').touch()
        (file.parent / '.write').unlink()
        for folder in made:  # a run that fails before its first step leaves nothing behind
            folder.rmdir()
        before = dict(json.loads(file.read_text())['config']) if file.exists() else None
    except OSError as error:
        raise UserError(f'cannot write to out_dir {out_dir}: {error.strerror}') from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{file} is damaged: choose another --out_dir, or delete it') from None
    changed = [k for k, v in config.items() if before and k not in neutral and before.get(k) != v]
    if changed:
        what = ', '.join(f'{k} {before.get(k)!r} there and {config[k]!r} here' for k in changed[:3])
        raise UserError(f'{out_dir} holds a different run ({what}): choose another --out_dir, or delete it')
    if before and (not resume or (file.parent / 'model').exists()):
        done = 'finished' if (file.parent / 'model').exists() else 'begun, and --resume is off'
        raise UserError(f'{out_dir} holds this run already ({done}): choose another --out_dir, or delete it')


def check_trackers(wandb, tensorboard):
    """Raise UserError now, not after minutes of loading, where wandb or tensorboard is asked for and does not work."""
    for name, module, wanted in (('wandb', 'wandb', wandb), ('tensorboard', 'torch.utils.tensorboard', tensorboard)):
        try:
            _ = wanted and importlib.import_module(module)
        except ImportError:
            raise UserError(f'--{name} needs a package that is not installed: pip install {name}') from None
    if wandb and os.environ.get('WANDB_MODE', 'online') == 'online':
        import wandb as tool

        try:
            tool.login()
        except tool.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(f'--wandb: {reason} Or set WANDB_API_KEY, or WANDB_MODE=offline.') from None


def claim_out_dir(out_dir, config):
    """Write config.json, now that the run is about to begin: options, command, commit, versions."""
    import torch
    import transformers

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
    record = {'config': dict(config), 'command': sys.argv, 'commit': git.stdout.strip()}
    record['versions'] = {'torch': torch.__version__, 'transformers': transformers.__version__}
    replace_text(Path(out_dir) / 'config.json', json.dumps(record, indent=1))


class Log:
    """On rank 0: metrics.jsonl (a row a step, a row an evaluation), a progress bar, and one line a row on the screen."""

    def __init__(self, out_dir, total, start, every, wandb=None, tensorboard=False, evaluated=None):
        from tqdm import tqdm

        self.total, self.every, self.began, self.start = total, every, time.time(), start
        self.sinks, self.closers = [], []
        if not main_rank():
            return
        evaluated = start if evaluated is None else evaluated  # examples at the last evaluation that was complete
        self.path = Path(out_dir) / 'metrics.jsonl'
        _cut(Path(out_dir) / 'samples.jsonl', lambda row: start and row['examples'] <= evaluated)
        _cut(Path(out_dir) / 'bad_step.jsonl', lambda row: row['examples'] <= start)
        last = {'eval': evaluated}
        _cut(self.path, lambda row: start and row['counters/examples'] <= last.get(row['split'], start))
        with writing(self.path):
            self.path.touch()
        slow = 0.5 if sys.stderr.isatty() else 20
        self.bar = tqdm(total=total, initial=start, unit='ex', mininterval=slow, dynamic_ncols=True)
        if wandb:
            run = _wandb_run(wandb, Path(out_dir))
            self.sinks.append(lambda row: run.log(row, step=row['counters/examples']))
            self.closers.append(run.finish)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: what is about to be done again after a resume is not shown twice
            writer = SummaryWriter(out_dir, purge_step=start + 1 if start else None, flush_secs=10)
            add = writer.add_scalar
            self.sinks.append(lambda row: [add(k, v, row['counters/examples']) for k, v in row.items() if k != 'split'])
            self.closers.append(writer.close)
        before = sys.excepthook
        # else an error would cost what they have not written yet
        sys.excepthook = lambda *error: (self.close(), before(*error))

    def row(self, split, examples, metrics):
        """Write metrics (name -> number) after so many examples; an evaluation and every log_every examples on screen."""
        if not main_rank():
            return
        metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}  # json knows no others; see bad_step.jsonl
        row = {'split': split, 'counters/examples': examples, **metrics}
        append(self.path, json.dumps(row) + '\n')
        for sink in self.sinks:
            sink(row)
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
            left = int((time.time() - self.began) / (examples - self.start) * (self.total - examples))
            parts += [
                f'grad {row.get("grad_norm", math.nan):.3g}  {row["examples_per_second"]:.1f} ex/s  {left // 60}:{left % 60:02d} left'
            ]
        return '  '.join(parts)

    def say(self, text):
        """Print above the progress bar."""
        if main_rank():
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        if main_rank():
            self.bar.close()
            try:
                append_kept()
            except UserError as error:
                say(f'warning: {error}, and are lost')
                _kept.clear()
            while self.closers:  # the process ends without the clean-up that would flush them
                self.closers.pop()()


def _wandb_run(project, out_dir):
    """The run of this out_dir: its id is kept there, so that a resumed run goes on in the same one."""
    import wandb

    file = out_dir / 'wandb_id.txt'
    if not file.exists():
        file.write_text(os.urandom(4).hex())
    record = json.loads((out_dir / 'config.json').read_text())
    options = record.pop('config')
    return wandb.init(project=project, name=out_dir.name, dir=out_dir, id=file.read_text(), resume='allow',
                      config={**options, **record})  # fmt: skip


def _cut(path, keep):
    """After a resume: keep the rows of a .jsonl that the checkpoint has seen, the rest is about to be done again. A last line
    that was half written when the run died goes as well."""
    if not path.exists():
        return
    lines = path.read_text(errors='replace').splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            kept += [line] if keep(json.loads(line)) else []
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f'{path}, line {number} is damaged: mend it, or choose another --out_dir') from None
    replace_text(path, ''.join(line + '\n' for line in kept))


def crossed(every, first, seen, total):
    """Whether the step from first to seen examples is one after which to do what is done every so many, but not at the end."""
    return every and seen < total and seen // every > first // every


def schedule(step, steps, warmup, shape):
    """Factor of the learning rate at a step: linear warm-up, then constant, linear or cosine to zero."""
    left = min(1.0, max(0.0, (steps - step) / max(1, steps - warmup)))
    shapes = {'constant': 1.0, 'linear': left, 'cosine': (1 - math.cos(math.pi * left)) / 2}
    return min(1.0, (step + 1) / (warmup + 1), shapes[shape])


def say(text):
    """Print once, whatever the number of ranks."""
    if main_rank():
        print(text, flush=True)


def say_too_long(lengths, max_tokens):
    """Say how many examples are longer than a microbatch should be."""
    if count := int((lengths > max_tokens).sum()):
        say(
            f'note: {count} examples are longer than max_tokens={max_tokens} (the longest: {lengths.max()}): '
            'each gets a microbatch of its own'
        )
