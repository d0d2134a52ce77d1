"""The Hugging Face folder that a run leaves: weights, config, tokenizer, and a model card, for people and for the hub (hf upload)."""

import json
import re
import shutil
from pathlib import Path

import yaml

from configurator import UserError
from fsdp import on_one_rank
from hf import lora
from hf.ties import tie_as, ties
from runtime import checkpoint
from runtime.files import make_room, move_folder, say, writing

HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')


def write_model(model, tokenizer, build, folder, card=None):
    """Write a normal Hugging Face folder: safetensors, config, tokenizer, and what card(folder) adds. build as in shard.

    A model with adapters: they alone to the folder `adapter` beside it, and then the model with them merged into its weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    checkpoint.wait()
    model.reshard()
    adapted = lora.present(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
    weights = get_model_state_dict(model, options=options)
    tied = ties(model)
    unique = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    folder = Path(folder)
    temporary, adapter = Path(f'{folder}.tmp'), folder.with_name('adapter')
    half_adapter = adapter.with_suffix('.tmp')

    def write():
        make_room(temporary)
        if adapted:
            merged = lora.merge(build(empty=False), weights, half_adapter)
            move_folder(half_adapter, adapter)
            merged.save_pretrained(temporary)
        else:
            # saving through the sharded model would write its changed class name
            shell = build(empty=True)
            tie_as(shell, tied)
            shell.all_tied_weights_keys = {}
            shell.save_pretrained(temporary, state_dict={k: v for k, v in weights.items() if k in unique})
        tokenizer.save_pretrained(temporary)

        # the card comes in the same rename: a run that is killed leaves both or neither
        if card:
            card(temporary)
        move_folder(temporary, folder)

    def guarded():
        try:
            with writing(folder):
                write()
        except UserError:
            # what is half written would take the room that the next try needs
            for half in (temporary, half_adapter):
                shutil.rmtree(half, ignore_errors=True)
            raise

    on_one_rank(guarded)


def write_card(out_dir, folder=None):
    """Write README.md of a model folder (None: out_dir/model). Where what it needs is damaged, a note: the model matters more."""
    try:
        text = _text(Path(out_dir))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        say(f'note: no model card, for {out_dir} has not what it takes: {type(error).__name__}: {error}')
        return
    file = Path(folder or Path(out_dir) / 'model') / 'README.md'
    with writing(file):
        file.write_text(text)


def _text(out_dir):
    """Base model, data, command, commit, options, the last evaluation. No path of this machine."""
    record = json.loads((out_dir / 'config.json').read_text())
    rows = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    options = record['config']
    base, script = str(options.get('model')), Path(record['command'][0]).name
    loss = options.get('loss') or script.removesuffix('.py')

    # the header that the hub reads
    meta = {'library_name': 'transformers', 'tags': ['nanopref', loss]}
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        meta['base_model'] = base
    header = yaml.safe_dump(meta, sort_keys=True)

    # how it was made
    examples, data = f'{rows[-1]["counters/examples"]:,}', options.get('data')
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    parts = [
        f'---\n{header}---\n',
        f'# {out_dir.resolve().name}\n',
        f'`{base}` after {examples} examples of `{data}` with the loss `{loss}`, by nanopref.\n',
        f'```sh\npython {" ".join(record["command"])}\n```\n',
        f'Commit {record["commit"] or "unknown"}; {versions}.\n',
    ]

    # what came of it
    evaluations = [row for row in rows if row['split'] == 'eval']
    if evaluations:
        table = [f'| {k} | {v:.4g} |' for k, v in evaluations[-1].items() if isinstance(v, float)]
        parts += ['Held-out examples, after training:\n\n| metric | value |\n|---|---|', '\n'.join(table) + '\n']
    listed = '\n'.join(f'{k} = {v!r}' for k, v in options.items())
    parts.append(f'Options:\n\n```python\n{listed}\n```\n')
    # absolute paths, and those that leave the folder, are cut to their last name
    return re.sub(r'(?<![\w./])(?:~|/|\.\./)[^\s\'"=:+|`]*/(?=[^\s/])', '', '\n'.join(parts))
