"""Where a run leaves its traces: out_dir/config.json, metrics.jsonl, the screen, and wandb or tensorboard if asked."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from configurator import UserError

# options that may differ when a run is continued: they change neither the result nor what is compared
NEUTRAL = {'resume', 'keep_last', 'log_every', 'save_every', 'max_tokens', 'compile', 'wandb', 'tensorboard'}


def open_run(out_dir, config, resume):
    """Claim out_dir for this run and write config.json. Raises UserError where it holds a different run."""
    file = Path(out_dir) / 'config.json'
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise UserError(f'{file} is damaged: choose another --out_dir, or delete it') from None
        changed = [k for k, v in config.items() if k not in NEUTRAL and before['config'].get(k) != v]
        if changed:
            what = ', '.join(f'{k} {before["config"].get(k)!r} there and {config[k]!r} here' for k in changed[:3])
            raise UserError(f'{out_dir} holds a different run ({what}): choose another --out_dir, or delete it')
        if not resume:
            raise UserError(f'{out_dir} holds this run already: choose another --out_dir, or let it --resume')
    import torch
    import transformers

    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
    record = {
        'config': dict(config), 'command': sys.argv, 'commit': git.stdout.strip(),
        'versions': {'torch': torch.__version__, 'transformers': transformers.__version__},
    }  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1))
    except OSError as error:
        raise UserError(f'cannot write to out_dir {out_dir}: {error.strerror}') from None


class Log:
    """metrics.jsonl (one line a step, one an evaluation), a progress bar and a line on the screen. On rank 0 only."""

    def __init__(self, out_dir, total, start, every, active, wandb=None, tensorboard=False):
        self.active, self.total, self.every, self.began, self.start = active, total, every, time.time(), start
        if not active:
            return
        from tqdm import tqdm

        path = Path(out_dir) / 'metrics.jsonl'
        if path.exists():  # after a resume: keep what the checkpoint has seen, the rest is about to be done again
            lines = [x for x in path.read_text().splitlines() if json.loads(x)['counters/examples'] <= start and start]
            path.write_text(''.join(line + '\n' for line in lines))
        self.file = path.open('a')
        slow = 0.5 if sys.stderr.isatty() else 20
        self.bar = tqdm(total=total, initial=start, unit='ex', mininterval=slow, dynamic_ncols=True, smoothing=0.1)
        self.sinks = []
        if wandb:
            import wandb as client

            run = client.init(project=wandb, name=Path(out_dir).name, dir=out_dir, id=None)
            self.sinks.append(lambda row: run.log(row, step=row['counters/examples']))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out_dir)
            self.sinks.append(
                lambda row: [writer.add_scalar(k, v, row['counters/examples']) for k, v in row.items() if k != 'split']
            )

    def row(self, split, examples, metrics):
        """Write one row of metrics (name -> number) after so many examples; print it if due."""
        if not self.active:
            return
        row = {'split': split, 'counters/examples': examples, **metrics}
        self.file.write(json.dumps(row) + '\n')
        self.file.flush()
        for sink in self.sinks:
            sink(row)
        self.bar.update(examples - self.bar.n)
        before = examples - metrics.get('counters/step_examples', 0)
        if split == 'eval' or examples // self.every > before // self.every:
            self.say(self.line(row))

    def line(self, row):
        """One readable line: example count, the few numbers to watch, speed, time left."""
        names = {
            'loss': 'loss', 'rewards/accuracies': 'acc', 'rewards/margins': 'margin', 'rewards/chosen': 'chosen',
            'rewards/rejected': 'rejected', 'kl/samples': 'kl', 'grad_norm': 'grad',
        }  # fmt: skip
        parts = [f'{row["split"]:5s} {row["counters/examples"]:>7d}/{self.total}']
        for name, short in names.items():
            group, _, rest = name.partition('/')
            key = name if not rest else f'{group}_{row["split"]}/{rest}'
            key = f'loss/{row["split"]}' if name == 'loss' else key
            if key in row:
                parts.append(f'{short} {row[key]:.4g}')
        if 'examples_per_second' in row:
            done = row['counters/examples'] - self.start
            left = (time.time() - self.began) / max(done, 1) * (self.total - row['counters/examples'])
            parts.append(f'{row["examples_per_second"]:.1f} ex/s  {int(left) // 60}:{int(left) % 60:02d} left')
        return '  '.join(parts)

    def say(self, text):
        """Print above the progress bar."""
        if self.active:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        if self.active:
            self.bar.close()
            self.file.close()


def schedule(step, steps, warmup, shape):
    """Factor of the learning rate at a step: linear warm-up, then constant, linear or cosine to zero."""
    if shape not in ('constant', 'linear', 'cosine'):
        raise UserError(f'lr_schedule must be constant, linear or cosine, not {shape!r}')
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    shapes = {'constant': 1.0, 'linear': left, 'cosine': (1 - math.cos(math.pi * left)) / 2}
    return min(1.0, (step + 1) / (warmup + 1), shapes[shape])


def say(text):
    """Print on rank 0."""
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)
