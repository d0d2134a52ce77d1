"""Export a trained model as a Hugging Face folder: weights, config, tokenizer and model card, ready for `hf upload`."""

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
import transformers
import yaml

from configurator import UserError
from hf import lora, quantize
from hf.load import model_hashes
from hf.parts import core
from hf.ties import tie_as, ties
from runtime import checkpoint
from runtime.files import clear_path, move_folder, replace_text, say, writing
from runtime.log import check_same, recorded
from runtime.ranks import on_rank_0
from text.examples import bos_of

LARGEST_FILE = '5GB'  # larger models are written as several files of weights
# Usage example for the card of a reward model; it reproduces the token ids of training (text/chat.py, text/tokenise.py).
# {first} is replaced by the ids at the start of every prompt: [BOS], or [] if the tokenizer adds no BOS.
SCORE = """The score of an answer, by transformers alone, exactly as in training. A chat template may write a line break behind the end of an
answer; with it the score would be another one. `python -m feedback.score` of nanopref scores whole files so.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('.')  # this folder
model = AutoModelForSequenceClassification.from_pretrained('.', dtype=torch.float32)
first, end = {first}, [tokenizer.eos_token_id]

def score(prompt, answer):  # the prompt as in training, a text or a list of messages; the answer, a text
    if not isinstance(prompt, str):
        whole = tokenizer.apply_chat_template([*prompt, {'role': 'assistant', 'content': answer}], tokenize=False)
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        answer = whole.removeprefix(prompt).rstrip('\\n')
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    ids = first * (prompt[:1] != first) + (prompt or end * (not first)) + answer + end * (answer[-1:] != end)
    return model(torch.tensor([ids])).logits[0, 0].item()
```
"""


def write_model(model, tokenizer, build, folder, card=None, dtype='float32'):
    """Write a sharded model to a Hugging Face folder, replacing any older one. All ranks call this; rank 0 writes. Raises UserError.

    build(empty): builds the same model unsharded on the CPU, or without weights. card(folder): writes the model card. With adapters,
    folder has the merged model, and `adapter` beside it the adapter alone. Returns the dtype written: float32 if `dtype` overflows."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # let a checkpoint that is being written in the background finish, and raise its error if it failed
    checkpoint.wait()
    model.reshard()
    # a model with adapters is a PeftModel around the transformers model, which core() returns
    has_adapters = core(model) is not model
    # gather weights on the CPU of rank 0; with adapters only the trained ones, of adapters and a reward model's head
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapters)
    weights = get_model_state_dict(model, options=options)
    folder = Path(folder)
    tied = ties(model)

    # the model itself is not saved, but one that is not sharded: FSDP renames the class, which would end up in the config
    def make_unsharded():
        if has_adapters:
            return _merged(build, weights, folder)
        unsharded = build(empty=True)
        tie_as(unsharded, tied)  # such as the LM head, if it is the embedding
        return unsharded, weights

    return on_rank_0(partial(_write_folder, make_unsharded, tokenizer, folder, card, getattr(torch, dtype)))


def _merged(build, trained_weights, folder):
    """Return a model with adapters of these weights merged into it, and its weights. Saves `adapter`, the adapter alone, beside folder."""
    adapted = build(empty=False)  # this reads the base model again, which may have changed since
    _check_same_model(folder.parent)
    temporary = folder.with_name('adapter.tmp')
    lora.write(adapted, trained_weights, temporary)
    model = quantize.dequantize(adapted).merge_and_unload()
    weights = model.state_dict()
    move_folder(temporary, folder.with_name('adapter'))
    return model, weights


def _write_folder(make_unsharded, tokenizer, folder, card, dtype):
    """Write all of a model's folder, and return the name of the dtype. make_unsharded(): returns the model and its weights."""
    temporary = folder.with_name(f'{folder.name}.tmp')
    try:
        with writing(folder):
            clear_path(temporary)
            model, weights = make_unsharded()
            written_dtype = _save_weights(model, weights, dtype, temporary)
            tokenizer.save_pretrained(temporary)
            # before the rename, so that no model is left without its card
            if card:
                card(temporary)
            move_folder(temporary, folder)
            return str(written_dtype).removeprefix('torch.')
    except Exception as error:
        for path in (temporary, folder.with_name('adapter.tmp')):  # free the disk space for the next attempt
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        # such as a config that transformers does not save: all ranks hear of a UserError, and then write a checkpoint
        raise UserError(f'cannot write {folder}: {shorten(f"{type(error).__name__}: {error}", 500)}') from error


def _check_same_model(out_dir):
    """Raise UserError if the model that the run in out_dir began with has changed: its adapters belong to that one."""
    run = recorded(out_dir)
    if run and 'model' in run['contents']:
        hashes_now = model_hashes(run['options']['model'])
        check_same(f'{out_dir} holds', run, run | {'contents': {'model': hashes_now}})


def _save_weights(model, weights, dtype, folder):
    """Save weights (name -> tensor), rounded to dtype, with model's class and config. Uses both up. Returns the dtype written."""
    dtype = _dtype_for(weights, dtype)
    # a tied tensor has several names: write it once, under the first, the only one that named_parameters() lists
    first_names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    generator = torch.Generator().manual_seed(0)  # fixed seed: the same weights always give the same file
    # as transformers does, keep some in float32, such as the bias by which DeepSeek V3 chooses experts
    parts_in_float32 = model._get_dtype_plan(dtype)  # parts of their names
    rounded_weights = {}
    for name, weight in weights.items():
        in_float32 = any(part in name for part in parts_in_float32)
        if name in first_names:
            rounded_weights[name] = rounded(weight, torch.float32 if in_float32 else dtype, generator)
    weights.clear()  # free the original weights, as large as the model, before writing
    # save_pretrained records the model's dtype in the config, so cast the model too; on the meta device that is free
    model.to('meta', dtype).save_pretrained(folder, state_dict=rounded_weights, max_shard_size=LARGEST_FILE)
    return dtype


def _dtype_for(weights, dtype):
    """Return dtype or, with a note, float32 if a finite one of the weights (name -> tensor) would overflow in dtype."""
    end = torch.finfo(dtype).max
    for name, weight in weights.items():
        most = torch.linalg.vector_norm(weight.float(), torch.inf) if weight.numel() else 0.0
        if end < most < torch.inf:
            say(f'note: {name} has a weight of {most:.6g}, and {dtype} ends at {end:.6g}: the model is kept in float32')
            return torch.float32
    return dtype


def rounded(weights, dtype, generator):
    """Round float32 weights to dtype at random: 30% of the way to the next number of dtype, a weight moves there with chance 0.3.

    So small updates from training survive on average. Below 6.1e-5, where float16 is coarser, weights go to its nearest number."""
    if not weights.is_floating_point():  # integers stay as they are
        return weights
    # mantissa bits of float32 that dtype lacks
    dropped_bits = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)
    if weights.dtype != torch.float32 or dropped_bits == 0:
        return weights.to(dtype)
    # add uniform noise to the dropped bits: the larger they are, the more often the sum carries into the kept bits
    bits = weights.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**dropped_bits, bits.shape, generator=generator, dtype=torch.int32)
    kept_mask = ~(2**dropped_bits - 1)
    kept = (bits + noise) & kept_mask
    return kept.view(torch.float32).to(dtype)


def write_card(out_dir, folder):
    """Write the card of the run in out_dir to folder/README.md; only say so if a file of the run is damaged."""
    try:
        text = _card_text(Path(out_dir), folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        say(f'note: no model card, as {out_dir} lacks a readable file: {type(error).__name__}: {error}')
        return
    replace_text(folder / 'README.md', text)


def _card_text(out_dir, folder):
    """Return the model card of a run as Markdown, without paths of this machine."""
    record = json.loads((out_dir / 'config.json').read_text())
    rows = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    saved_config = json.loads((folder / 'config.json').read_text())
    options = record['config']
    base = str(options.get('model'))
    # sft.py and reward.py have no option loss: use the script's name
    loss = options.get('loss') or Path(record['command'][0]).name.removesuffix('.py')
    # metadata for the hub, which links to a base model that is on the hub, too
    header = {'library_name': 'transformers', 'tags': ['nanopref', loss]}
    looks_like_hub_id = re.fullmatch(r'[\w.-]+/[\w.-]+', base)
    if looks_like_hub_id and not Path(base).exists():
        header['base_model'] = base
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    text = f"""---
{yaml.safe_dump(header, sort_keys=True)}---

# {out_dir.resolve().name}

`{base}` after {rows[-1]['counters/examples']:,} examples of `{options.get('data')}` with the loss `{loss}`, by nanopref.

```sh
python {shlex.join(record['command'])}
```

Commit {record['commit'] or 'unknown'}; {versions}.
"""
    # with --quantize the base model was in 4 bits, not in float32
    if options.get('save_dtype') and not options.get('quantize'):
        text += f'\nThe weights were trained in float32, and are kept in {saved_config["dtype"]}.\n'
    architecture = saved_config.get('architectures', [''])[0]
    if architecture.endswith('SequenceClassification'):
        first = bos_of(transformers.AutoTokenizer.from_pretrained(folder))
        first_ids = '[]' if first is None else f'[{first}]'
        text += '\n' + SCORE.replace('{first}', first_ids)
    evaluations = [row for row in rows if row['split'] == 'eval']
    if evaluations:
        text += '\nHeld-out examples, after training:\n\n| metric | value |\n|---|---|\n'
        for name, value in evaluations[-1].items():
            if isinstance(value, float):
                text += f'| {name} | {value:.4g} |\n'
    listed = '\n'.join(f'{name} = {value!r}' for name, value in options.items())
    text += f'\nOptions:\n\n```python\n{listed}\n```\n'
    # reduce paths that start with /, ~ or ../ to their last component: /home/me/out/dpo -> dpo
    return re.sub(r'(?<![\w./])(?:~|/|\.\./)[^\s\'"=:+|`]*/(?=[^\s/])', '', text)
