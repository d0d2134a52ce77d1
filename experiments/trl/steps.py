"""dpo.py and reward.py against TRL's trainers: same weights, same pairs in the same order, in float32, step by step.

    pip install trl==1.16.0     # beside requirements.txt, in an environment of its own: nanopref never needs TRL
    python -m experiments.trl.steps                         # on toy pairs, half a minute
    python -m experiments.trl.steps --write                 # makes the files of tests/parts anew that hold what TRL says

Ours are packed and share prompts, TRL's are padded. Exit code 1 where token ids differ, or a loss, reward, log-prob or gradient norm by more
than 1e-4. Warm-up, weight decay and truncation are off, and the tokenizer has a pad token: the two mean different things by them
(experiments/LOG.md, agreement with TRL)."""

import importlib.metadata
import json
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configurator import UserError, configure
from experiments import ROOT, read_rows, run, table, write_rows
from text import toy

kinds = 'dpo reward'  # what to compare
write = False  # make the numbers of tests/parts anew

TOLERANCE = 1e-4
COMMON = {  # of both sides: five steps of 8 pairs and one of 4, of which the last two are the second epoch's
    'batch_size': 8, 'n_epochs': 2, 'n_examples': 44, 'max_length': 512, 'lr_schedule': 'constant', 'warmup_steps': 0,
    'weight_decay': 0.0, 'max_grad_norm': 1.0, 'seed': 0, 'do_first_eval': False, 'n_eval_examples': 0,
}  # fmt: skip


def toy_model(architecture, folder):
    """Write a tiny model and a tokenizer of bytes. A formula gives the weights, so that they never change. Returns the tokenizer."""
    import tokenizers
    import torch
    import transformers

    size = {
        'vocab_size': 260, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
        'max_position_embeddings': 512, 'bos_token_id': None, 'eos_token_id': 256,
    }  # fmt: skip
    shape = transformers.GPTNeoXConfig(**size)
    if architecture == 'llama':
        shape = transformers.LlamaConfig(**size, num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
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


def toy_reward(architecture, folder):
    """Write a tiny reward model and its tokenizer; a formula gives the weights. Returns the tokenizer."""
    import torch

    from hf.load import load_reward, separate_pad

    with tempfile.TemporaryDirectory() as language_model:
        tok = separate_pad(toy_model(architecture, language_model))
        model = load_reward(language_model, tok, new_head=True)
    with torch.no_grad():
        i = torch.arange(model.score.in_features, dtype=torch.float64)
        model.score.weight.copy_(torch.sin(0.37 * i**2)[None] / 4)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return tok


def toy_pairs(margins=False):
    """Return the first 32 short pairs of the toy world. margins: add the difference of the gold rewards, never below 0."""
    pairs = []
    for pair in toy.pairs('train'):
        if len(pair['chosen']) + len(pair['rejected']) < 120:
            chosen, rejected = (toy.gold(pair['prompt'], pair[side]) for side in ('chosen', 'rejected'))
            margin = {'margin': round(max(0.0, chosen - rejected), 3)}
            pairs.append(pair | margin if margins else pair)
    return pairs[:32]


KINDS = {
    'dpo': SimpleNamespace(
        script='dpo.py',
        trainer='DPO',  # TRL has a DPOTrainer, and a DPOConfig for its options
        auto='AutoModelForCausalLM',  # class of transformers that loads the model
        own_options={'beta': 'beta'},  # options of this trainer alone, and what we call them
        model=toy_model,  # (architecture, folder) -> the tokenizer of a model that it writes there
        pairs=toy_pairs,
        options={'loss': 'dpo', 'beta': 0.1} | COMMON | {'max_grad_norm': 2.5},  # of both sides, in all runs
        runs={  # more options, and the model's architecture; max_tokens: several microbatches a step
            'SGD': {'model': 'neox', 'optimizer': 'SGD', 'lr': 0.02, 'max_tokens': 500},
            'AdamW': {'model': 'llama', 'optimizer': 'AdamW', 'lr': 5e-4},
        },
        columns={  # TRL's names of what is compared, and ours
            'loss': 'loss/train', 'rewards/chosen': 'rewards_train/chosen', 'rewards/rejected': 'rewards_train/rejected',
            'logps/chosen': 'logps_train/chosen', 'logps/rejected': 'logps_train/rejected', 'grad_norm': 'grad_norm',
        },
        numbers=ROOT / 'tests/parts/trl_numbers.json',  # what TRL says
    ),
    'reward': SimpleNamespace(
        script='reward.py', trainer='Reward', auto='AutoModelForSequenceClassification',
        own_options={'center_rewards_coefficient': 'center_coef'}, model=toy_reward, pairs=partial(toy_pairs, margins=True), options=COMMON,
        runs={
            'SGD': {'model': 'neox', 'optimizer': 'SGD', 'lr': 0.05, 'max_tokens': 500},
            'AdamW': {'model': 'llama', 'optimizer': 'AdamW', 'lr': 1e-3, 'center_coef': 0.05},
        },
        columns={
            'loss': 'loss/train', 'mean_reward': 'rewards_train/mean', 'margin': 'rewards_train/margins',
            'accuracy': 'rewards_train/accuracies', 'grad_norm': 'grad_norm',
        },
        numbers=ROOT / 'tests/parts/trl_reward_numbers.json',
    ),
}  # fmt: skip


def with_nanopref(kind, folder, file, out_dir, options):
    """Run our script by its command line, on the CPU. Returns the kind's columns of every step."""
    flags = [f'--{name}={value}' for name, value in options.items()]
    flags += [f'--model={folder}', f'--data={file}', f'--eval_data={file}', f'--out_dir={out_dir}']
    run(kind.script, *flags, NANOPREF_CACHE=str(Path(out_dir).parent / 'cache'), CUDA_VISIBLE_DEVICES='')
    rows = [row for row in read_rows(Path(out_dir) / 'metrics.jsonl') if row['split'] == 'train']
    if any(row['padding_share'] for row in rows):
        raise UserError(f'{kind.script} found packing to be wrong and padded: packed is what should be compared')
    return [{name: row[key] for name, key in kind.columns.items()} for row in rows]


def with_trl(kind, folder, pairs, work, options):
    """Run the trainer, on the CPU, on the pairs in the order of our steps. Returns (the kind's columns of every step, token ids)."""
    import datasets
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        import trl
    except ImportError:
        raise UserError('TRL is not installed: pip install trl==1.16.0 in an environment of its own') from None
    args = getattr(trl, f'{kind.trainer}Config')(
        output_dir=str(work), per_device_train_batch_size=options['batch_size'], num_train_epochs=1,
        learning_rate=options['lr'], optim={'SGD': 'sgd', 'AdamW': 'adamw_torch'}[options['optimizer']],
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=options['weight_decay'],
        lr_scheduler_type='constant', warmup_steps=0, max_grad_norm=options['max_grad_norm'], disable_dropout=True,
        max_length=options['max_length'], train_sampling_strategy='sequential', gradient_checkpointing=False, bf16=False,
        use_cpu=True, logging_steps=1, report_to='none', save_strategy='no', disable_tqdm=True, seed=options['seed'],
        **{their: options.get(our) for their, our in kind.own_options.items()},
    )  # fmt: skip
    # DPOTrainer loads the folder once more, as its reference
    model = getattr(transformers, kind.auto).from_pretrained(folder, dtype=torch.float32)
    rows = datasets.Dataset.from_list([pairs[i] for i in order(len(pairs), options)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = getattr(trl, f'{kind.trainer}Trainer')(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    steps = [{name: row[name] for name in kind.columns} for row in trainer.state.log_history if 'loss' in row]
    # DPOTrainer keeps the prompt apart, RewardTrainer has it before each answer
    sides = 'chosen_ids', 'rejected_ids'
    ids = [[row.get('prompt_ids', []) + row[side] for side in sides] for row in trainer.train_dataset]
    return steps, ids


def order(n, options):
    """Return the indices of the examples of all our steps, end to end."""
    from data import steps

    total = min(options['n_epochs'] * n, options['n_examples'] or math.inf)
    every = steps(n, options['batch_size'], total, options['seed'])
    return [int(i) for _, index in every for i in index]


def compare(kind, name, pairs, work):
    """Run both sides of one run, print their numbers. Returns (whether they agree, what the file of numbers keeps of the run)."""
    from text.tokenise import load_examples

    options = kind.options | kind.runs[name]
    architecture = options.pop('model')
    folder, file = work / 'model', work / 'pairs.jsonl'
    tok = kind.model(architecture, folder)
    write_rows(file, pairs)
    theirs, their_ids = with_trl(kind, folder, pairs, work / 'trl', options)
    ours = with_nanopref(kind, folder, file, work / 'nanopref', options)

    # token ids that our script makes: prompt + answer of [chosen, rejected], in the order of its steps
    lengths = {'max_length': options['max_length'], 'max_prompt_length': 256}
    examples = load_examples(str(file), 'train', tok, 'pairs', undivided=True, cache=False, **lengths)
    rows = [examples[i] for i in order(len(examples), options)]
    our_ids = [[[*prompt.tolist(), *answer.tolist()] for answer in answers] for prompt, answers in rows]

    # the numbers of both sides, step by step
    rows = []
    for step, (our, their) in enumerate(zip(ours, theirs, strict=False), 1):
        for side, row in (('nanopref', our), ('TRL', their)):
            rows.append([step, side, *(f'{row[column]:.8f}' for column in kind.columns)])
    off = [[our[column] - their[column] for column in kind.columns] for our, their in zip(ours, theirs, strict=False)]
    worst = np.abs(np.reshape(off, (-1, len(kind.columns)))).max(0, initial=0.0)  # NaN if one is NaN
    rows.append(['largest', 'difference', *(f'{x:.1e}' for x in worst)])
    print(f'\n{kind.script}, {name}: {json.dumps(options)}\n\n{table(["step", "", *kind.columns], rows)}', end='')
    same_ids = our_ids == their_ids
    agreed = same_ids and len(ours) == len(theirs) > 0 and worst.max() <= TOLERANCE
    ids, verdict = 'equal' if same_ids else 'differ', 'agrees' if agreed else 'DISAGREES'
    print(f'{len(ours)} and {len(theirs)} steps, token ids {ids}: {verdict}, limit {TOLERANCE}')
    return agreed, {'model': architecture, 'options': options, 'steps': theirs}


def main():
    configure(globals())
    if not kinds.split() or set(kinds.split()) - KINDS.keys():
        raise UserError(f'--kinds takes some of {" ".join(KINDS)}, not {kinds!r}')
    agreed = True
    for kind in map(KINDS.get, kinds.split()):
        runs, pairs = {}, kind.pairs()
        for name in kind.runs:
            with tempfile.TemporaryDirectory() as work:
                agrees, runs[name] = compare(kind, name, pairs, Path(work))
            agreed &= agrees
        if write:
            versions = {name: importlib.metadata.version(name) for name in ('trl', 'torch', 'transformers')}
            about = f"What TRL's {kind.trainer}Trainer says: made by experiments/trl/steps.py --write, compared by test_trl.py."
            content = {'about': about, 'versions': versions, 'runs': runs, 'pairs': pairs}
            kind.numbers.write_text(json.dumps(content, indent=1) + '\n')
            print(f'\nwritten: {kind.numbers.relative_to(ROOT)}')
    sys.exit(0 if agreed else 1)


if __name__ == '__main__':
    main()
