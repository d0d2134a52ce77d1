"""reward.py against TRL's RewardTrainer: same weights and head, same pairs in the same order, in float32, step by step.

    pip install trl==1.16.0     # beside requirements.txt, in an environment of its own: nanopref never needs TRL
    python -m experiments.trl.reward
    python -m experiments.trl.reward --write      # makes tests/parts/trl_reward_numbers.json, what TRL says, anew

The rows carry margins. Ours are packed and share prompts, TRL's are padded. Exit code 1 where token ids differ, or a loss,
a mean score, a margin, an accuracy or a gradient norm by more than 1e-4. Half a minute. Warm-up, weight decay and
truncation are switched off, as in compare_trl.py. TRL pads with the end of text where the tokenizer has no pad token, and
then reads the score one token before the end of text; here the tokenizer has one, so that both read it at the end.
"""

import sys
import tempfile
from pathlib import Path

from configurator import UserError, configure
from experiments import ROOT
from experiments.trl import dpo as compare_trl
from text import toy

write = False  # make tests/parts/trl_reward_numbers.json anew

NUMBERS = ROOT.joinpath('tests/parts/trl_reward_numbers.json')


N_PAIRS = 32
OPTIONS = {  # of both: five steps of 8 pairs and one of 4, of which the last two are the second epoch's
    'batch_size': 8, 'n_epochs': 2, 'n_examples': 44, 'max_length': 512, 'lr_schedule': 'constant', 'warmup_steps': 0,
    'weight_decay': 0.0, 'max_grad_norm': 1.0, 'seed': 0, 'do_first_eval': False, 'n_eval_examples': 0,
}  # fmt: skip
RUNS = {  # max_tokens: several microbatches a step
    'SGD': {'model': 'neox', 'optimizer': 'SGD', 'lr': 0.05, 'max_tokens': 500},
    'AdamW': {'model': 'llama', 'optimizer': 'AdamW', 'lr': 1e-3, 'center_coef': 0.05},
}
COLUMNS = {  # TRL's names and ours
    'loss': 'loss/train', 'mean_reward': 'rewards_train/mean', 'margin': 'rewards_train/margins',
    'accuracy': 'rewards_train/accuracies', 'grad_norm': 'grad_norm',
}  # fmt: skip


def toy_reward(kind, folder):
    """A tiny reward model and its tokenizer, as a folder; a formula gives the weights. Returns the tokenizer."""
    import torch

    from hf.load import load_reward, separate_pad

    with tempfile.TemporaryDirectory() as language_model:
        tok = separate_pad(compare_trl.toy_model(kind, language_model))
        model = load_reward(language_model, tok, new_head=True)
    with torch.no_grad():
        width = model.score.in_features
        model.score.weight.copy_(torch.sin(0.37 * torch.arange(width, dtype=torch.float64) ** 2)[None] / 4)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return tok


def toy_pairs():
    """Short toy pairs with the difference of the gold rewards as a margin, never below 0."""
    pairs = [p for p in toy.pairs('train') if len(p['chosen']) + len(p['rejected']) < 120][:N_PAIRS]
    better = [toy.gold(p['prompt'], p['chosen']) - toy.gold(p['prompt'], p['rejected']) for p in pairs]
    return [pair | {'margin': round(max(0.0, by), 3)} for pair, by in zip(pairs, better, strict=True)]


def with_nanopref(folder, file, out_dir, options):
    """Run reward.py by its command line, on the CPU. Returns COLUMNS of every step."""
    return compare_trl.with_nanopref(folder, file, out_dir, options, 'reward.py', COLUMNS)


def with_trl(folder, pairs, work, options):
    """Run RewardTrainer on the pairs in the order of our steps. Returns (COLUMNS of every step, [chosen, rejected] ids)."""
    import datasets
    import torch
    import transformers

    try:
        from trl import RewardConfig, RewardTrainer
    except ImportError:
        raise UserError('TRL is missing: pip install trl==1.16.0, in an environment of its own') from None
    datasets.disable_progress_bars()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    args = RewardConfig(
        output_dir=str(work), per_device_train_batch_size=options['batch_size'], num_train_epochs=1,
        learning_rate=options['lr'], optim={'SGD': 'sgd', 'AdamW': 'adamw_torch'}[options['optimizer']],
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=options['weight_decay'],
        lr_scheduler_type='constant', warmup_steps=0, max_grad_norm=options['max_grad_norm'],
        center_rewards_coefficient=options.get('center_coef'), disable_dropout=True, max_length=options['max_length'],
        train_sampling_strategy='sequential', gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1,
        report_to='none', save_strategy='no', disable_tqdm=True, seed=options['seed'],
    )  # fmt: skip
    rows = [pairs[i] for i in compare_trl.order(len(pairs), options)]
    trainer = RewardTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows),
                            processing_class=transformers.AutoTokenizer.from_pretrained(folder))  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    ids = [[row['chosen_ids'], row['rejected_ids']] for row in trainer.train_dataset]
    return [{name: row[name] for name in COLUMNS} for row in trainer.state.log_history if 'loss' in row], ids


def compare(name, pairs, options, work):
    """Run both sides, print their numbers. Returns (whether they agree, TRL's steps)."""
    options = dict(options)
    folder, file = f'{work}/{name}', Path(work) / 'pairs.jsonl'
    tok = toy_reward(options.pop('model'), folder)
    compare_trl.write_pairs(pairs, file)
    theirs, their_ids = with_trl(folder, pairs, f'{work}/trl_{name}', options)
    ours = with_nanopref(folder, file, f'{work}/nanopref_{name}', options)
    ids = [[p + a for a in answers] for p, *answers in compare_trl.our_ids(tok, file, options)]
    return compare_trl.agree(name, options, COLUMNS, ours, theirs, ids == their_ids), theirs


def main():
    configure(globals())
    results, runs, pairs = [], {}, toy_pairs()
    with tempfile.TemporaryDirectory() as work:
        for name, more in RUNS.items():
            options = OPTIONS | more
            found, steps = compare(name, pairs, options, work)
            results.append(found)
            runs[name] = {'model': options.pop('model'), 'options': options, 'steps': steps}
    if write:
        compare_trl.write_numbers(NUMBERS, 'RewardTrainer', runs, pairs)
    sys.exit(0 if all(results) else 1)


if __name__ == '__main__':
    main()
