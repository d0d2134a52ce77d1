"""The Hugging Face folder that a run leaves: weights, config, tokenizer, and a model card, for people and for the hub (hf upload)."""

import json
import re
import shutil
from pathlib import Path

import torch
import transformers
import yaml

from configurator import UserError
from fsdp import on_one_rank
from hf import lora
from hf.ties import tie_as, ties
from runtime import checkpoint
from runtime.files import make_room, move_folder, say, writing
from text.ids import first_of

SHARD = '5GB'  # the size of a file of weights, of which a larger model has several
# for the card of a reward model: what training saw (text/chat.py, text/ids.py), whose prompts begin with BOS or not
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
    """Write a normal Hugging Face folder: safetensors of this dtype, config, tokenizer, and what card(folder) adds.

    build as in shard. Adapters go, in float32, to the folder `adapter` beside it, and merged into this one. Returns, on rank 0,
    the dtype: float32 where a weight is larger than what the other one holds."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    checkpoint.wait()
    model.reshard()
    adapted, tied = lora.present(model), ties(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
    weights = get_model_state_dict(model, options=options)
    folder = Path(folder)
    temporary, adapter = Path(f'{folder}.tmp'), folder.with_name('adapter')
    half_adapter = adapter.with_suffix('.tmp')

    def write():
        make_room(temporary)
        # saving through the sharded model would write its changed class name
        if adapted:
            whole = lora.write(build(empty=False), weights, half_adapter)
            found = whole.state_dict()
            move_folder(half_adapter, adapter)
        else:
            whole, found = build(empty=True), weights
            tie_as(whole, tied)
            whole.all_tied_weights_keys = {}
        unique = {name for name, _ in [*whole.named_parameters(), *whole.named_buffers()]}
        kept_in = _holds(found, getattr(torch, dtype))
        random = torch.Generator().manual_seed(0)
        found = {name: rounded(value, kept_in, random) for name, value in found.items() if name in unique}
        whole.to('meta', kept_in).save_pretrained(temporary, state_dict=found, max_shard_size=SHARD)
        tokenizer.save_pretrained(temporary)
        # the card comes in the same rename: a run that is killed leaves both or neither
        if card:
            card(temporary)
        move_folder(temporary, folder)
        return str(kept_in).removeprefix('torch.')

    def guarded():
        try:
            with writing(folder):
                return write()
        except UserError:
            # what is half written would take the room that the next try needs
            for half in (temporary, half_adapter):
                shutil.rmtree(half, ignore_errors=True)
            raise

    return on_one_rank(guarded)


def _holds(weights, dtype):
    """This dtype, or float32 where one of the weights {name: tensor} is beyond its largest number: it would become infinite."""
    limit = torch.finfo(dtype).max
    for name, weight in weights.items():
        size = torch.linalg.vector_norm(weight.float(), torch.inf) if weight.numel() else 0
        if limit < size < torch.inf:
            say(
                f'note: {name} has a weight of {size:.6g}, and {dtype} ends at {limit:.6g}: the model is kept in float32'
            )
            return torch.float32
    return dtype


def rounded(weights, dtype, random):
    """Weights in this dtype, rounded up or down at random, each the likelier the nearer it is. random: a torch.Generator.

    On average that keeps what training has moved: the nearest number is mostly the one that a weight began from."""
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)  # bits of the mantissa
    if weights.dtype != torch.float32 or not dropped:
        return weights.to(dtype) if weights.is_floating_point() else weights
    bits = weights.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**dropped, bits.shape, generator=random, dtype=torch.int32)
    return ((bits + noise) & -(2**dropped)).view(torch.float32).to(dtype)


def write_card(out_dir, folder=None):
    """Write README.md of a model folder (None: out_dir/model). Where what it needs is damaged, a note: the model matters more."""
    folder = Path(folder or Path(out_dir) / 'model')
    try:
        text = _text(Path(out_dir), folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return say(f'note: no model card, for {out_dir} has not what it takes: {type(error).__name__}: {error}')
    with writing(folder / 'README.md'):
        (folder / 'README.md').write_text(text)


def _text(out_dir, folder):
    """Base model, data, command, commit, options, the last evaluation. No path of this machine."""
    record = json.loads((out_dir / 'config.json').read_text())
    rows = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    saved = json.loads((folder / 'config.json').read_text())
    options = record['config']
    base, script = str(options.get('model')), Path(record['command'][0]).name
    loss = options.get('loss') or script.removesuffix('.py')

    # the header that the hub reads
    meta = {'library_name': 'transformers', 'tags': ['nanopref', loss]}
    if re.fullmatch(r'[\w.-]+/[\w.-]+', base) and not Path(base).exists():
        meta['base_model'] = base
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    # how it was made
    text = f"""---
{yaml.safe_dump(meta, sort_keys=True)}---

# {out_dir.resolve().name}

`{base}` after {rows[-1]['counters/examples']:,} examples of `{options.get('data')}` with the loss `{loss}`, by nanopref.

```sh
python {' '.join(record['command'])}
```

Commit {record['commit'] or 'unknown'}; {versions}.
"""
    if options.get('save_dtype'):
        text += f'\nThe weights were trained in float32, and are kept in {saved["dtype"]}.\n'
    # how a reward model is used
    if saved.get('architectures', [''])[0].endswith('SequenceClassification'):
        first = first_of(transformers.AutoTokenizer.from_pretrained(folder))
        text += '\n' + SCORE.replace('{first}', '[]' if first is None else f'[{first}]')

    # what came of it
    evaluations = [row for row in rows if row['split'] == 'eval']
    if evaluations:
        table = [f'| {k} | {v:.4g} |' for k, v in evaluations[-1].items() if isinstance(v, float)]
        text += '\nHeld-out examples, after training:\n\n| metric | value |\n|---|---|\n' + '\n'.join(table) + '\n'
    listed = '\n'.join(f'{k} = {v!r}' for k, v in options.items())
    text += f'\nOptions:\n\n```python\n{listed}\n```\n'
    # absolute paths, and those that leave the folder, are cut to their last name
    return re.sub(r'(?<![\w./])(?:~|/|\.\./)[^\s\'"=:+|`]*/(?=[^\s/])', '', text)
