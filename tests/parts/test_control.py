"""sft.py --control_tokens: both answers of a pair, told apart by a token at the end of the prompt; and the card that a run leaves."""

import json

import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers import metrics, read_jsonl, run_script, write_jsonl
from test_model import GROUPED, OLD

from hf import export, generate, load
from text import toy
from text.examples import Examples


@pytest.mark.parametrize('spare', [0, 1, 5])
@pytest.mark.parametrize(('name', 'tied'), [('llama', False), ('llama', True), ('gpt2', True), ('phi', False)])
def test_new_rows_are_the_mean_of_the_others(name, tied, spare, tmp_path):
    t = toy.tokenizer()
    rows = len(t) + spare
    options = (OLD if name == 'gpt2' else GROUPED) | {'vocab_size': rows, 'tie_word_embeddings': tied}
    plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **options))
    plain.save_pretrained(tmp_path)
    t.add_tokens(['<|good|>', '<|bad|>'], special_tokens=True)
    model, shell = (load.load_model(str(tmp_path), empty=empty, tokenizer=t, grow=True) for empty in (False, True))
    grown = max(rows, len(t))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shell.state_dict().items()}
    assert model.config.vocab_size == shell.config.vocab_size == grown
    for get in ('get_input_embeddings', 'get_output_embeddings'):
        layer, before = (getattr(net, get)() for net in (model, plain))
        assert layer.weight.shape[0] == grown and layer.weight[:rows].equal(before.weight)
        for row in layer.weight[rows:]:
            assert row.equal(before.weight.mean(0))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of sft.py on six pairs, good answers and bad ones; the model has not a row to spare."""
    folder = tmp_path_factory.mktemp('control')
    t, config = toy.tokenizer(), toy.model_config()
    config.vocab_size = len(t)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / 'base')
    t.save_pretrained(folder / 'base')
    pair = {'prompt': 'Review of the {0}:', 'chosen': ' superb {0} .', 'rejected': ' awful {0} .'}
    rows = [{column: text.format(place) for column, text in pair.items()} for place in toy.PLACES]
    write_jsonl(folder / 'pairs.jsonl', rows)
    where = f'--model={folder}/base --data={folder}/pairs.jsonl --eval_data={folder}/pairs.jsonl --out_dir={folder}/run'
    how = '--control_tokens --batch_size=12 --n_epochs=160 --lr=5e-3 --lr_schedule=linear --warmup_steps=0'
    samples = '--do_first_eval=false --temperature=0 --sample_during_eval --max_new_tokens=12'
    run_script('sft.py', *f'{where} {how} {samples}'.split())
    return folder / 'run'


def test_every_prompt_says_what_follows():
    good, bad = 70, 80
    examples = Examples.of([([1, 2], [[3, 9]]), ([4], [[5, 6, 9]])])
    examples.good = np.array([True, False])
    marked = examples.control(good, bad)
    found = [(prompt.tolist(), answer.tolist()) for prompt, (answer,) in (marked[0], marked[1])]
    assert found == [([1, 2, good], [3, 9]), ([4, bad], [5, 6, 9])]
    assert (marked.uid == examples.uid).all() and (marked.good == examples.good).all()
    assert len(examples.select(slice(0)).control(good, bad)) == 0


def test_the_token_decides(trained):
    assert metrics(trained)[-1]['loss/eval'] < 0.05  # what was learned is certain, so that no rounding decides
    t = transformers.AutoTokenizer.from_pretrained(trained / 'model')
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / 'model').eval()
    assert model.get_input_embeddings().num_embeddings == len(t) == len(toy.tokenizer()) + 2
    for token, word in (('<|good|>', 'superb'), ('<|bad|>', 'awful')):
        ids = [t(f'Review of the {place}:{token}')['input_ids'] for place in toy.PLACES]
        drawn = generate.generate(model, t, ids, [0] * len(ids), max_new_tokens=12, temperature=0)
        answers = [t.decode(answer) for answer in drawn]
        assert all(answer.startswith(f' {word} ') and answer.endswith(' .') for answer in answers), answers
        assert t.decode(ids[0], skip_special_tokens=True) == 'Review of the hotel:'
    samples = read_jsonl(trained / 'samples.jsonl')
    assert len(samples) == 6 and all(row['prompt'].endswith('<|good|>') for row in samples)  # asked for good ones alone


def test_card_of_a_run(trained):
    text = (trained / 'model/README.md').read_text()
    _, front, body = text.split('---\n')
    assert yaml.safe_load(front) == {'library_name': 'transformers', 'tags': ['nanopref', 'sft']}  # base is no hub id
    assert body.strip().startswith('# run\n\n`base` after 1,920 examples of `pairs.jsonl` with the loss `sft`')
    assert 'control_tokens = True' in text and '| loss/eval |' in text and '--n_epochs=160' in text
    assert str(trained.parent) not in text and '/' not in body.split('Held-out')[0].replace('`', '')


def test_card_names_the_hub_and_no_folders(tmp_path):
    config = {'model': 'EleutherAI/pythia-70m', 'loss': 'drdpo', 'out_dir': 'out/a', 'lr': 1e-6}
    config |= {'data': 'hh:/home/me/hh.jsonl.gz+shp', 'eval_data': '../x/y.jsonl', 'ref_model': '~/models/base'}
    command = ['/opt/nanopref/dpo.py', 'config/a.py', '--data=hh:/home/me/hh.jsonl.gz+shp', '--ref_model=~/models/base']
    command += ['--columns=prompt=a, chosen=b']
    record = {'config': config, 'command': command, 'commit': '', 'versions': {'torch': '2'}}
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model/config.json').write_text('{}')
    (tmp_path / 'config.json').write_text(json.dumps(record))
    write_jsonl(tmp_path / 'metrics.jsonl', [{'split': 'train', 'counters/examples': 64, 'loss/train': 0.5}])
    export.write_card(tmp_path, tmp_path / 'model')
    text = (tmp_path / 'model/README.md').read_text()
    front = {'base_model': 'EleutherAI/pythia-70m', 'library_name': 'transformers', 'tags': ['nanopref', 'drdpo']}
    assert yaml.safe_load(text.split('---\n')[1]) == front
    # a shell reads it as the words that were given
    command = "python dpo.py config/a.py --data=hh:hh.jsonl.gz+shp '--ref_model=base' '--columns=prompt=a, chosen=b'"
    assert f'{command}\n' in text
    assert "eval_data = 'y.jsonl'" in text and "out_dir = 'out/a'" in text and 'lr = 1e-06' in text
    assert not any(word in text for word in ('home', 'opt', '~', '..', str(tmp_path.parent)))
