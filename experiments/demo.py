"""make demo: SFT and Dr. DPO on the toy world under torchrun with 2 processes, then what came of it, as a short table."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time

from experiments import ROOT
from text import toy

SFT, DPO = ROOT / 'out' / 'demo_sft', ROOT / 'out' / 'demo_drdpo'


def launch(*command):
    """Run a script under torchrun with 2 processes; stop here if it fails."""
    print('\n$ torchrun --nproc_per_node=2 ' + ' '.join(command), flush=True)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', *command]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}  # torchrun would set it too, with a warning
    if subprocess.run(torchrun, cwd=ROOT, env=environment).returncode:
        sys.exit('the demo stopped: the lines above say why')


def main():
    began = time.time()
    for folder in (SFT, DPO):
        shutil.rmtree(folder, ignore_errors=True)
    launch('sft.py', 'config/sft_toy.py', '--out_dir=out/demo_sft')
    launch('dpo.py', 'config/drdpo_toy.py', '--model=out/demo_sft/model', '--out_dir=out/demo_drdpo',
           '--sample_during_eval', '--n_eval_model_samples=256')  # fmt: skip
    rows = [json.loads(line) for line in (DPO / 'metrics.jsonl').read_text().splitlines()]
    check = next(row for row in rows if row['split'] == 'check')
    before, after = [row for row in rows if row['split'] == 'eval'][
        :: len([r for r in rows if r['split'] == 'eval']) - 1
    ]
    samples = [json.loads(line) for line in (DPO / 'samples.jsonl').read_text().splitlines()]
    samples = [row for row in samples if row['examples'] == max(r['examples'] for r in samples)]
    policy, reference = ([r for r in samples if r['generator'] == name] for name in ('policy', 'reference'))

    def gold(answers):
        values = [toy.gold(row['prompt'], row['response']) for row in answers]
        error = statistics.stdev(values) / len(values) ** 0.5
        return f'{statistics.mean(values):+.3f} (standard error {error:.3f})'

    def well_formed(answers):
        return f'{statistics.mean(toy.well_formed(row["response"]) for row in answers):.1%}'

    print(f'\n{"=" * 100}\nDr. DPO on the toy world, after {time.time() - began:.0f} seconds\n')
    table = [
        ('before the first step', f'rewards {abs(check["rewards_train/chosen"]):.4f} and {abs(check["rewards_train/rejected"]):.4f},'
         f' loss {check["loss/train"]:.4f}', 'must be 0, 0 and log 2 = 0.6931'),
        ('held-out pairs: accuracy', f'{before["rewards_eval/accuracies"]:.3f} -> {after["rewards_eval/accuracies"]:.3f}',
         'pairs whose chosen answer has the higher implicit reward (before: all are equal)'),
        ('held-out pairs: margin', f'{before["rewards_eval/margins"]:.3f} -> {after["rewards_eval/margins"]:.3f}',
         'chosen minus rejected implicit reward'),
        ('gold reward, reference', gold(reference), f'mean over {len(reference)} sampled answers'),
        ('gold reward, aligned', gold(policy), f'mean over {len(policy)} sampled answers'),
        ('well-formed answers', f'{well_formed(reference)} -> {well_formed(policy)}', 'the text must not break'),
        ('KL(aligned || reference)', f'{after["kl_eval/samples"]:.2f} nats an answer', 'on its own samples: the price'),
    ]  # fmt: skip
    for name, value, meaning in table:
        print(f'  {name:26s} {value:48s} {meaning}')
    differ = [i for i, row in enumerate(policy) if row['response'] != reference[i]['response']]
    shown = {policy[i]['prompt']: i for i in reversed(differ)}
    for i in sorted(shown.values())[:3]:
        print(f'\n  {policy[i]["prompt"]}')
        for name, row in (('reference', reference[i]), ('aligned', policy[i])):
            print(f'    {name:10s} {toy.gold(row["prompt"], row["response"]):+.2f} {row["response"]}')
    print(f'\nThe aligned model is a Hugging Face folder: {(DPO / "model").relative_to(ROOT)}')


main()
