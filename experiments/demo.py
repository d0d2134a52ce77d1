"""make demo: SFT and Dr. DPO on the toy world under torchrun with 2 processes, then what came of it, as a short table."""

import os
import shutil
import statistics
import subprocess
import sys
import time

from configurator import configure
from experiments import ROOT, evaluations, read_rows
from text import toy

SFT, DPO = ROOT / 'out' / 'demo_sft', ROOT / 'out' / 'demo_drdpo'


def launch(*command):
    """Run a script under torchrun with 2 processes; stop here if it fails."""
    print('\n$ torchrun --nproc_per_node=2 ' + ' '.join(command), flush=True)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', *command]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}  # torchrun would set it too, with a warning
    if subprocess.run(torchrun, cwd=ROOT, env=environment).returncode:
        sys.exit('the demo stopped: the lines above say why')


configure(globals())
began = time.time()
for folder in (SFT, DPO):
    shutil.rmtree(folder, ignore_errors=True)
launch('sft.py', 'config/sft_toy.py', f'--out_dir={SFT}')
sampling = '--sample_during_eval', '--n_eval_model_samples=256'
launch('dpo.py', 'config/drdpo_toy.py', f'--model={SFT}/model', f'--out_dir={DPO}', *sampling)

# numbers of the first step, the evaluations and the last samples
(check,) = (row for row in read_rows(DPO / 'metrics.jsonl') if row['split'] == 'check')
before, *_, after = evaluations(DPO)
answers = {'reference': [], 'policy': []}
for row in read_rows(DPO / 'samples.jsonl'):
    if row['examples'] == after['counters/examples']:
        row['gold'] = toy.gold(row['prompt'], row['response'])
        answers[row['generator']].append(row)
reference, policy = answers.values()
gold, well_formed = [], []
for rows in answers.values():
    values = [row['gold'] for row in rows]
    error = statistics.stdev(values) / len(values) ** 0.5
    gold.append(f'{statistics.mean(values):+.3f} (standard error {error:.3f})')
    well_formed.append(statistics.mean(toy.well_formed(row['response']) for row in rows))
first = abs(check['rewards_train/chosen']), abs(check['rewards_train/rejected']), check['loss/train']
accuracy = [row['rewards_eval/accuracies'] for row in (before, after)]
margin = [row['rewards_eval/margins'] for row in (before, after)]

print(f'\n{"=" * 100}\nDr. DPO on the toy world, after {time.time() - began:.0f} seconds\n')
lines = [
    ('before the first step', 'rewards {:.4f} and {:.4f}, loss {:.4f}'.format(*first), 'must be 0, 0 and log 2 = 0.6931'),
    ('held-out pairs: accuracy', '{:.3f} -> {:.3f}'.format(*accuracy),
     'pairs whose chosen answer has the higher implicit reward (before: all are equal)'),
    ('held-out pairs: margin', '{:.3f} -> {:.3f}'.format(*margin), 'chosen minus rejected implicit reward'),
    ('gold reward, reference', gold[0], f'mean over {len(reference)} sampled answers'),
    ('gold reward, aligned', gold[1], f'mean over {len(policy)} sampled answers'),
    ('well-formed answers', '{:.1%} -> {:.1%}'.format(*well_formed), 'the text must not break'),
    ('KL(aligned || reference)', f'{after["kl_eval/samples"]:.2f} nats an answer', 'on its own samples: the price'),
]  # fmt: skip
for name, value, meaning in lines:
    print(f'  {name:26s} {value:48s} {meaning}')

# three prompts whose answers differ
shown = {}
for old, new in zip(reference, policy, strict=True):
    if old['response'] != new['response']:
        shown.setdefault(new['prompt'], (old, new))
for prompt, (old, new) in list(shown.items())[:3]:
    print(f'\n  {prompt}')
    for name, row in (('reference', old), ('aligned', new)):
        print(f'    {name:10s} {row["gold"]:+.2f} {row["response"]}')
print(f'\nThe aligned model is a Hugging Face folder: {(DPO / "model").relative_to(ROOT)}')
