"""Write the Hugging Face folder that a run leaves: weights, config, tokenizer and a model card, ready for `hf upload`.

At the end of a run runtime/guard.py calls write_model on all ranks, and training.py hands it write_card for the card."""

import json
import re
import shutil
from pathlib import Path

import torch
import transformers
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from configurator import UserError
from fsdp import on_one_rank
from hf import lora
from hf.ties import tie_as, ties
from runtime import checkpoint
from runtime.files import make_room, move_folder, say, writing
from text.ids import bos_of

SHARD = '5GB'  # a file of weights has this size at most, so a larger model is written as several files
# The card of a reward model shows how to score an answer. It makes the ids that training saw (text/chat.py, text/ids.py).
# {first} is replaced by the ids that every prompt begins with: [BOS], or [] for a tokenizer that writes no BOS.
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
    """Write a sharded model as a normal Hugging Face folder. All ranks call this together; rank 0 writes.

    build(empty) makes the same model on the CPU, as in fsdp.shard; card(folder) adds the model card; dtype names the type
    of the weights. With adapters, `folder` gets the model with the adapters merged, and `adapter` beside it the adapters
    alone, in float32. Older folders are replaced. Returns, on rank 0, the name of the written type: float32 where dtype cannot
    hold a weight. Raises UserError where the disk does not take the files."""
    # a thread may still be writing a checkpoint: if it fails, the error is raised here
    checkpoint.wait()
    # a forward may leave gathered copies in the place of the weights that the optimizer changes
    model.reshard()
    # gather whole tensors on the CPU of rank 0; beside adapters, the frozen weights have not changed and are left out
    has_adapters = lora.present(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapters)
    trained_weights = get_model_state_dict(model, options=options)
    tied = ties(model)
    folder = Path(folder)
    temporary = folder.with_name(f'{folder.name}.tmp')
    adapter_temporary = folder.with_name('adapter.tmp')

    def write():
        """Write all files on rank 0 under temporary names, then rename the folders. Return the name of the written type."""
        make_room(temporary)
        # a fresh model writes the files: FSDP has renamed the class of the sharded one, and its config would say so
        if has_adapters:
            adapted = build(empty=False)
            lora.write(adapted, trained_weights, adapter_temporary)
            move_folder(adapter_temporary, folder.with_name('adapter'))
            plain_model = lora.merged(adapted)
            weights = plain_model.state_dict()
        else:
            plain_model = build(empty=True)
            tie_as(plain_model, tied)
            weights = trained_weights
        written_dtype = _save_weights(plain_model, weights, getattr(torch, dtype), temporary)
        tokenizer.save_pretrained(temporary)
        # the card comes before the rename, so a killed run leaves a model with its card, or neither
        if card:
            card(temporary)
        move_folder(temporary, folder)
        return str(written_dtype).removeprefix('torch.')

    return on_one_rank(lambda: _or_delete(write, folder, [temporary, adapter_temporary]))


def _or_delete(write, folder, half_written):
    """Return write(). If the disk is full, delete the half_written folders, whose room the next try needs, and raise UserError."""
    try:
        with writing(folder):
            return write()
    except UserError:
        for path in half_written:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _save_weights(model, weights, dtype, folder):
    """Save weights (name -> tensor), rounded at random to dtype, and the model's config. Return the dtype that was written.

    model: it gives class, config and names; its own weights are not used, and it is moved to the meta device."""
    dtype = _dtype_that_holds(weights, dtype)
    # a tensor with two names, such as a head that is the embedding, is written once, under its first name
    first_names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    # from one seed, so that the same weights always leave the same file
    generator = torch.Generator().manual_seed(0)
    rounded_weights = {name: rounded(weights[name], dtype, generator) for name in weights if name in first_names}
    # the config gets the model's dtype, which costs no memory to change on the meta device
    model.to('meta', dtype).save_pretrained(folder, state_dict=rounded_weights, max_shard_size=SHARD)
    return dtype


def _dtype_that_holds(weights, dtype):
    """Return dtype, or torch.float32 where a weight is beyond the largest number of dtype and would become infinite.

    weights: name -> tensor. A note on the screen names the first such weight."""
    limit = torch.finfo(dtype).max
    for name, weight in weights.items():
        if weight.numel() == 0:
            continue
        largest = torch.linalg.vector_norm(weight.float(), torch.inf)
        # a weight that is infinite already would be so in float32, too
        if limit < largest < torch.inf:
            kept = f'{dtype} ends at {limit:.6g}: the model is kept in float32'
            say(f'note: {name} has a weight of {largest:.6g}, and {kept}')
            return torch.float32
    return dtype


def rounded(weights, dtype, generator):
    """Return weights in dtype, each rounded up or down at random so that its mean stays (stochastic rounding).

    A number at 0.3 of the way between two numbers of dtype becomes the second one with probability 0.3. Rounding to the
    nearest would undo small steps of training. generator: a torch.Generator. Only float32 is rounded so: other floating
    point types are cast, and integers are returned as they are."""
    if not weights.is_floating_point():
        return weights
    # how many of the 23 bits of float32's mantissa dtype lacks
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)
    if weights.dtype != torch.float32 or dropped == 0:
        return weights.to(dtype)
    # noise on the dropped bits: the larger their value is, the more often the sum carries into the kept bits
    bits = weights.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**dropped, bits.shape, generator=generator, dtype=torch.int32)
    kept_bits = ~(2**dropped - 1)
    return ((bits + noise) & kept_bits).view(torch.float32).to(dtype)


def write_card(out_dir, folder):
    """Write the model card, README.md, of the run in out_dir into its model folder. Raises UserError if the disk is full.

    Where a file of the run is missing or damaged, there is a note and no card: the model matters more."""
    try:
        text = _card_text(Path(out_dir), folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        say(f'note: no model card, for {out_dir} has not what it takes: {type(error).__name__}: {error}')
        return
    with writing(folder / 'README.md'):
        (folder / 'README.md').write_text(text)


def _card_text(out_dir, folder):
    """Return the text of a run's model card, in which no path of this machine is left."""
    record = json.loads((out_dir / 'config.json').read_text())
    rows = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    saved_config = json.loads((folder / 'config.json').read_text())
    options = record['config']
    base = str(options.get('model'))
    # sft.py and reward.py have no option loss: their own name says it
    loss = options.get('loss') or Path(record['command'][0]).name.removesuffix('.py')

    # the header that the hub reads; a base model is named where it is on the hub
    header = {'library_name': 'transformers', 'tags': ['nanopref', loss]}
    looks_like_hub_id = re.fullmatch(r'[\w.-]+/[\w.-]+', base)
    if looks_like_hub_id and not Path(base).exists():
        header['base_model'] = base
    # how the model was made
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    text = f"""---
{yaml.safe_dump(header, sort_keys=True)}---

# {out_dir.resolve().name}

`{base}` after {rows[-1]['counters/examples']:,} examples of `{options.get('data')}` with the loss `{loss}`, by nanopref.

```sh
python {' '.join(record['command'])}
```

Commit {record['commit'] or 'unknown'}; {versions}.
"""
    if options.get('save_dtype'):
        text += f'\nThe weights were trained in float32, and are kept in {saved_config["dtype"]}.\n'
    # how a reward model is used
    architecture = saved_config.get('architectures', [''])[0]
    if architecture.endswith('SequenceClassification'):
        first = bos_of(transformers.AutoTokenizer.from_pretrained(folder))
        first_ids = '[]' if first is None else f'[{first}]'
        text += '\n' + SCORE.replace('{first}', first_ids)

    # what came of it
    evaluations = [row for row in rows if row['split'] == 'eval']
    if evaluations:
        table = [f'| {name} | {value:.4g} |' for name, value in evaluations[-1].items() if isinstance(value, float)]
        text += '\nHeld-out examples, after training:\n\n| metric | value |\n|---|---|\n' + '\n'.join(table) + '\n'
    listed = '\n'.join(f'{name} = {value!r}' for name, value in options.items())
    text += f'\nOptions:\n\n```python\n{listed}\n```\n'
    # a path that is absolute, or begins with ~ or ../, is cut to its last name: nobody else has these folders
    return re.sub(r'(?<![\w./])(?:~|/|\.\./)[^\s\'"=:+|`]*/(?=[^\s/])', '', text)
