"""dpo.py against TRL's DPOTrainer: same weights, same pairs in the same order, DPO in float32, step by step.

    pip install trl==1.16.0     # beside requirements.txt, in an environment of its own: nanopref never needs TRL
    python -m experiments.trl.dpo --hh=PATH/hh_harmless.jsonl.gz --tokenizer=PATH/pythia_tokenizer.json
    python -m experiments.trl.dpo --write      # makes tests/parts/trl_numbers.json, what TRL says about toy pairs, anew

Ours are packed and share prompts, TRL's are padded. Exit code 1 where token ids differ, or a loss, a reward, a log-prob
or a gradient norm by more than 1e-4. A few minutes. What is switched off, because the two mean different things by it:
  warm-up       TRL's first step has learning rate 0, ours 1 / (warmup_steps + 1) of the full one
  weight decay  TRL exempts biases and norms, we decay all weights
  truncation    TRL cuts the end of prompt + answer, and with it the end of text; we cut the prompt first, then the answer,
                and keep the end of text: the pairs here are short enough for both
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from configurator import UserError, configure
from experiments import ROOT
from text import toy

hh: str | None = None  # HH pairs: a .jsonl.gz file of Anthropic/hh-rlhf
tokenizer: str | None = None  # the tokenizer.json of the Pythia models
write = False  # make tests/parts/trl_numbers.json anew

NUMBERS = ROOT.joinpath('tests/parts/trl_numbers.json')


N_PAIRS = 32
TOLERANCE = 1e-4
OPTIONS = {  # of both: five steps of 8 pairs and one of 4, of which the last two are the second epoch's
    'loss': 'dpo', 'beta': 0.1, 'batch_size': 8, 'n_epochs': 2, 'n_examples': 44, 'max_length': 512,
    'lr_schedule': 'constant', 'warmup_steps': 0, 'weight_decay': 0.0, 'max_grad_norm': 2.5, 'seed': 0,
    'do_first_eval': False, 'n_eval_examples': 0,
}  # fmt: skip
HH_RUNS = {
    'SGD': {'optimizer': 'SGD', 'lr': 0.05},
    'AdamW': {'optimizer': 'AdamW', 'lr': 1e-4},
}
TOY_RUNS = {  # max_tokens: several microbatches a step
    'SGD': {'model': 'neox', 'optimizer': 'SGD', 'lr': 0.02, 'max_tokens': 500},
    'AdamW': {'model': 'llama', 'optimizer': 'AdamW', 'lr': 5e-4},
}
COLUMNS = {  # TRL's names and ours
    'loss': 'loss/train', 'rewards/chosen': 'rewards_train/chosen', 'rewards/rejected': 'rewards_train/rejected',
    'logps/chosen': 'logps_train/chosen', 'logps/rejected': 'logps_train/rejected', 'grad_norm': 'grad_norm',
}  # fmt: skip


# ---- models and pairs ----


def hh_model(folder):
    """A model of the shape of pythia-14m with random weights, and its tokenizer, as a folder. Dropout, to be off."""
    import torch
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=2048, hidden_dropout=0.1, initializer_range=0.05, bos_token_id=0, eos_token_id=0,
        rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0, 'partial_rotary_factor': 0.25},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tok = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token='<|endoftext|>')
    tok.save_pretrained(folder)
    return tok


def hh_pairs(tok):
    """The first pairs that need no truncation."""
    from text import sources

    rows, _ = sources.load_rows(f'hh:{hh}', 'train', undivided=True)
    sizes = ((len(tok(row['prompt'] + row[side]).input_ids) for side in ('chosen', 'rejected')) for row in rows)
    fit = [row for row, size in zip(rows, sizes, strict=True) if max(size) < OPTIONS['max_length'] - 1]
    print(f'the first {N_PAIRS} of {len(fit)} pairs of at most {OPTIONS["max_length"]} tokens ({len(rows)} in all)')
    return fit[:N_PAIRS]


def toy_model(kind, folder):
    """A tiny model and a tokenizer of bytes, as a folder. A formula gives the weights: no generator has to stay as it is."""
    import tokenizers
    import torch
    import transformers

    size = {
        'vocab_size': 260, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
        'max_position_embeddings': 512, 'bos_token_id': None, 'eos_token_id': 256,
    }  # fmt: skip
    kinds = {
        'neox': transformers.GPTNeoXConfig(**size),
        'llama': transformers.LlamaConfig(**size, num_key_value_heads=2, tie_word_embeddings=True),
    }
    model = transformers.AutoModelForCausalLM.from_config(kinds[kind], dtype=torch.float32)
    with torch.no_grad():
        for k, (name, p) in enumerate(model.named_parameters()):
            i = torch.arange(p.numel(), dtype=torch.float64)
            wave = torch.sin(0.37 * i**2 + k).reshape(p.shape)  # quadratic: a sine of i alone has rank two
            is_norm = 'norm' in name and name.endswith('weight')
            small = wave / (4 if p.dim() > 1 else 10)
            p.copy_(1 + wave / 10 if is_norm else small)
    model.save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token='<|endoftext|>')
    tok.save_pretrained(folder)
    return tok


def write_pairs(pairs, file):
    Path(file).write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))


# ---- the two sides ----


def with_nanopref(folder, file, out_dir, options, script='dpo.py', columns=COLUMNS):
    """Run a script by its command line, on the CPU. Returns these columns of every step."""
    flags = [f'--{name}={value}' for name, value in options.items()]
    flags += [f'--model={folder}', f'--data={file}', f'--eval_data={file}', f'--out_dir={out_dir}']
    environment = os.environ | {'NANOPREF_CACHE': str(Path(out_dir).parent / 'cache'), 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, script, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'{script} stopped with exit code {done.returncode}: {done.stderr.strip()[-2000:]}')
    rows = [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]
    rows = [row for row in rows if row['split'] == 'train']
    if any(row['padding_share'] for row in rows):
        raise UserError(f'{script} found packing to be wrong and padded instead: packed is what should be compared')
    return [{name: row[key] for name, key in columns.items()} for row in rows]


def with_trl(folder, pairs, work, options):
    """Run DPOTrainer, on the CPU, on the pairs in the order of our steps. Returns (COLUMNS of every step, its token ids)."""
    import datasets
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise UserError('TRL is not installed: pip install trl==1.16.0 in an environment of its own') from None
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    args = DPOConfig(
        output_dir=str(work), per_device_train_batch_size=options['batch_size'], num_train_epochs=1,
        learning_rate=options['lr'], optim={'SGD': 'sgd', 'AdamW': 'adamw_torch'}[options['optimizer']],
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=options['weight_decay'],
        lr_scheduler_type='constant', warmup_steps=0, max_grad_norm=options['max_grad_norm'],
        loss_type='sigmoid', beta=options['beta'], disable_dropout=True, precompute_ref_log_probs=False,
        max_length=options['max_length'], train_sampling_strategy='sequential', gradient_checkpointing=False, bf16=False,
        use_cpu=True, logging_steps=1, report_to='none', save_strategy='no', disable_tqdm=True, seed=options['seed'],
    )  # fmt: skip
    trainer = DPOTrainer(
        model, reference, args, train_dataset=datasets.Dataset.from_list([pairs[i] for i in order(len(pairs), options)]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    ids = [[row['prompt_ids'], row['chosen_ids'], row['rejected_ids']] for row in trainer.train_dataset]
    return [{name: row[name] for name in COLUMNS} for row in trainer.state.log_history if 'loss' in row], ids


def order(n, options):
    """The examples of all our steps, end to end."""
    from data import steps

    total = min(options['n_epochs'] * n, options['n_examples'] or math.inf)
    return [int(i) for _, index in steps(n, options['batch_size'], total, options['seed']) for i in index]


def our_ids(tok, file, options):
    """What dpo.py makes of the file: [prompt, chosen, rejected] in the order of our steps."""
    from text.tokenise import load_examples

    examples = load_examples(str(file), 'train', tok, 'pairs', max_length=options['max_length'], max_prompt_length=256,
                             undivided=True, cache=False)  # fmt: skip
    rows = [examples[i] for i in order(len(examples), options)]
    return [[x.tolist() for x in (prompt, *answers)] for prompt, answers in rows]


# ---- the comparison ----


def agree(name, options, columns, ours, theirs, same_ids):
    """Print the numbers of both sides, step by step. Returns whether they agree."""
    print(f'\n{name}: {json.dumps(options)}\n')
    print(f'{"step":4s} {"":9s}' + ''.join(f'{column:>18s}' for column in columns))
    both = list(zip(ours, theirs, strict=False))
    for step, pair in enumerate(both, 1):
        for label, side, row in zip((step, ''), ('nanopref', 'TRL'), pair, strict=True):
            print(f'{label:<4} {side:9s}' + ''.join(f'{row[column]:18.8f}' for column in columns))
    worst = {column: max((abs(a[column] - b[column]) for a, b in both), default=math.inf) for column in columns}
    print(f'{"largest":14s}' + ''.join(f'{worst[column]:18.1e}' for column in columns))
    found = same_ids and len(ours) == len(theirs) and max(worst.values()) <= TOLERANCE
    ids, verdict = 'equal' if same_ids else 'differ', 'agrees' if found else 'DISAGREES'
    print(f'{len(ours)} and {len(theirs)} steps, token ids {ids}: {verdict}, limit {TOLERANCE}')
    return found


def first_difference(tok, ids, their_ids):
    """Where the ids of two lists of pairs differ first, as a sentence; None where they do not."""
    for our, their in zip(ids, their_ids, strict=False):
        for part, a, b in zip(('prompt', 'chosen', 'rejected'), our, their, strict=True):
            if a != b:
                k = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                here, there = (tok.convert_ids_to_tokens(x[max(0, k - 3) : k + 4]) for x in (a, b))
                return f'token ids differ in {part} at {k}: {here} here, {there} in TRL'
    return None if len(ids) == len(their_ids) else f'{len(ids)} and {len(their_ids)} pairs'


def compare(name, tok, folder, pairs, options, work):
    """Run both sides, print their numbers. Returns (whether they agree, TRL's steps)."""
    file = Path(work) / 'pairs.jsonl'
    write_pairs(pairs, file)
    theirs, their_ids = with_trl(folder, pairs, f'{work}/trl_{name}', options)
    ours, ids = with_nanopref(folder, file, f'{work}/nanopref_{name}', options), our_ids(tok, file, options)
    lengths = [len(p) + len(a) for p, *answers in ids for a in answers]
    print(f'\nprompt and answer: {min(lengths)} to {max(lengths)} tokens')
    wrong = first_difference(tok, ids, their_ids)
    if wrong:
        print(wrong)
    return agree(name, options, COLUMNS, ours, theirs, not wrong), theirs


def write_numbers(file, trainer, runs, pairs):
    """Write what TRL says into a file that test_trl.py reads."""
    import torch
    import transformers
    import trl

    versions = {m.__name__: m.__version__ for m in (trl, torch, transformers)}
    about = f"What TRL's {trainer} says: made by experiments/trl, --write, compared by test_trl.py."
    content = {'about': about, 'versions': versions, 'runs': runs, 'pairs': pairs}
    file.write_text(json.dumps(content, indent=1) + '\n')
    print(f'\nwritten: {file.relative_to(ROOT)}')


def main():
    configure(globals())
    if not write and not (hh and tokenizer):
        raise UserError('give --hh=PATH and --tokenizer=PATH for the comparison on real pairs, or --write')
    for path in filter(None, (hh, tokenizer)):
        if not Path(path).is_file():
            raise UserError(f'there is no file {path}')
    results = []
    with tempfile.TemporaryDirectory() as work:
        if hh:
            tok = hh_model(f'{work}/model')
            pairs = hh_pairs(tok)
            for name, more in HH_RUNS.items():
                results.append(compare(name, tok, f'{work}/model', pairs, OPTIONS | more, work)[0])
        if write:
            runs, pairs = {}, [p for p in toy.pairs('train') if len(p['chosen']) + len(p['rejected']) < 120][:N_PAIRS]
            for name, more in TOY_RUNS.items():
                options = OPTIONS | more
                folder = f'{work}/{options.pop("model")}'
                found, steps = compare(name, toy_model(more['model'], folder), folder, pairs, options, work)
                results.append(found)
                runs[name] = {'model': more['model'], 'options': options, 'steps': steps}
            write_numbers(NUMBERS, 'DPOTrainer', runs, pairs)
    sys.exit(0 if all(results) else 1)


if __name__ == '__main__':
    main()
