"""The datasets: where examples come from. Adding one is adding a get_foo(split, path) -> (rows, parse).

rows are the raw rows as the hub, or the local file or folder `path`, has them; parse(row) -> list of examples, each one of
  {'prompt', 'chosen', 'rejected'}, with 'sft' where the SFT target is not simply the chosen answer, and 'margin', a number,
  where it is known by how much the chosen one is better;
  {'prompt', 'response'}, with 'good': bool for KTO;  {'prompt'};  {'drop': reason} for what the dataset's rules leave out.
A row that is not what it should be makes parse raise ValueError(reason). Texts are strings in Anthropic's format
('\\n\\nHuman: ...\\n\\nAssistant:', then ' answer') or lists of chat messages.
"""

import gzip
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from contextlib import suppress
from functools import cache, wraps
from html.parser import HTMLParser
from itertools import combinations, islice
from operator import itemgetter
from pathlib import Path

from configurator import UserError
from log import say

ENDINGS = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.parquet')
NO_TEST_SPLIT = {'se', 'sharegpt', 'annotations'}
LONGEST = 10_000_000  # characters of a text, or of all messages of a chat
REASONING = ('reasoning_content', 'thinking', 'reasoning')  # the fields that a message's thoughts stand in
ROLES = {
    **dict.fromkeys(('user', 'human', 'prompter', 'question'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'model', 'bot', 'chatbot', 'ai'), 'assistant'),
    **{role: role for role in ('system', 'developer', 'tool', 'function', 'ipython')},
}
HELD_OUT = 20  # without a test split, the prompts whose hash is 0 modulo this are held out
HUB = {  # named dataset -> where the hub has it
    'hh': 'Anthropic/hh-rlhf',
    'hh_helpful': 'Anthropic/hh-rlhf',
    'hh_harmless': 'Anthropic/hh-rlhf',
    'shp': 'stanfordnlp/SHP',
    'se': 'HuggingFaceH4/stack-exchange-preferences',
    'sharegpt': 'anon8231489123/ShareGPT_Vicuna_unfiltered',
    'imdb': 'insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english',
    'oasst': 'OpenAssistant/oasst1',
    'ultrafeedback': 'HuggingFaceH4/ultrafeedback_binarized',
    'ultrafeedback_hybrid': 'wzhouad/gemma-2-ultrafeedback-hybrid',
    'ultrachat': 'HuggingFaceH4/ultrachat_200k',
    'alpaca_eval': 'tatsu-lab/alpaca_eval',
}
LOOK_AHEAD = 100  # rows behind a first bad one, to see whether all are so
HELP = 'see README, "Data of your own"'
KNOWN = (
    'known are prompt (or question, instruction, query) with chosen and rejected, or with response (completion, output) '
    'and perhaps good (label); messages; text'
)
DIFFERENT = 'chosen and rejected have different prompts'
REPEATED = 'note: answers that repeated their prompt, which was taken off'


class Row(dict):
    """A row, or an example, that knows where it stands ('file, line n'), and why it could not be read, if so."""

    where = error = ''


def load_rows(source, split, *, whole=False, num_turns=1, skip_bad_rows=False):
    """The examples of one source ('hh', 'hh:PATH', 'toy', a hub id, a file or folder) -> (list, Counter of reasons).

    split: 'train' or 'test'. A single file, or a dataset without a test split, is divided by a hash of the prompt unless
    whole. The Counter says what was left out; reasons that begin with 'note: ' are of examples that stay. An example's
    .where is the file and line it comes from. Raises UserError for an unreadable source and, unless skip_bad_rows, for a bad
    row."""
    getter, path, hub_id = locate(source)
    name = source.partition(':')[0] if getter else ''
    undivided = False
    if getter:
        rows, parse = getter(split, path, **({'num_turns': num_turns} if name == 'sharegpt' else {}))
    elif path:
        rows, parse = read_rows(None, split, path), parse_any
    else:
        undivided = 'test' not in hub_splits(hub_id)
        rows, parse = read_rows(hub_id, 'train' if undivided else split, None), parse_any
    divide = not whole and (name in NO_TEST_SPLIT or undivided or (path and len(data_files(path)) == 1))
    examples, left_out = [], Counter()
    rows = iter(rows)
    for row in rows:
        try:
            found = _parse(row, parse)
        except (ValueError, RecursionError) as error:  # the latter: nested a thousand deep
            if not skip_bad_rows:
                behind = None if examples or left_out else islice(rows, LOOK_AHEAD)
                raise UserError(_refusal(row, error, behind, parse, name)) from None
            left_out[f'bad rows: {error}'] += 1
            continue
        for example in found:
            if 'drop' in example:
                left_out[example['drop']] += 1
                continue
            example = Row(example)
            example.where = row.where  # tokenise names the row that a chat template refuses
            examples.append(example)
    examples = _agreeing(examples, left_out, skip_bad_rows)
    if divide:
        test = split == 'test'
        examples = [x for x in examples if (content_hash(_asked(x['prompt'])) % HELD_OUT == 0) == test]
    return examples, left_out


def locate(source):
    """(getter, local path, hub id) of one source, each None where there is no such: what is read, and what it is known by."""
    name, _, path = source.partition(':')
    getter = globals().get(f'get_{name}')
    if path:
        data_files(path)  # raises if there is none
    if getter and not path and os.path.exists(name):
        _note(f'note: {name!r} is the dataset of that name, not what lies in ./{name}: for that write ./{name}')
    if getter:
        return getter, path or None, None if path else HUB.get(name)
    if os.path.exists(source):
        return None, source, None
    if source.endswith(ENDINGS) or source.count('/') != 1:
        known = ', '.join(sorted(n.removeprefix('get_') for n in globals() if n.startswith('get_')))
        raise UserError(
            f'data {source!r} is no file or folder here and no hub id (owner/name): correct it ({HELP}), or name one of '
            f'the known datasets: {known}'
        )
    return None, None, source


@cache
def _note(text):
    say(text)  # once, though a source is read for training and for evaluation


def _parse(row, parse):
    """The examples of a row; raises ValueError where it could not be read, or makes none."""
    if row.error:
        raise ValueError(row.error)
    return parse(row)


def _refusal(row, error, behind, parse, reader):
    """The sentence on a bad row. behind: the next rows, to see whether all are so; None where a good one came before."""
    bad = f'{row.where}: {error}' + (f'; found: {_columns(row)}' if row else '')
    looked_at = 0 if behind is None else _all_bad(behind, parse)
    if not looked_at:
        return f'{bad}; mend it, or leave such rows out with --skip_bad_rows ({HELP})'
    if row.error:
        fits = 'a row is a JSON object with named fields'
    elif reader:
        fits = f'the reader {reader!r} is for another one; without {reader + ":"!r} the columns decide'
    else:
        fits = f'{KNOWN}: rename the columns'
    return f'{bad}; none of the first {looked_at} rows can be read, so it is the layout: {fits} ({HELP})'


def _all_bad(rows, parse):
    """How many rows there are with the bad one before them, if none of them can be read; else 0."""
    count = 1
    try:
        for row in rows:
            try:
                _parse(row, parse)
                return 0
            except (ValueError, RecursionError):
                count += 1
    except UserError:  # the file ends in something broken
        pass
    return count


def _columns(row):
    """The columns of a row and what is in them, for a message."""
    kinds = {str: 'text', list: 'list', dict: 'object', bool: 'true or false', int: 'number', float: 'number'}
    named = [f'{str(key)[:24]!r} ({kinds.get(type(value), "null")})' for key, value in row.items()]
    return ', '.join(named[:6]) + (f' and {len(named) - 6} more' if len(named) > 6 else '')


def _agreeing(examples, left_out, skip_bad_rows):
    """The examples, if all answers of text repeat their prompt (which is off by now and counted) or none does.

    In a source where some do and others do not, those that do are bad rows: 'Hi' may begin an answer to 'Hi'."""
    repeats = [example.pop('repeats', None) for example in examples]
    many, few = repeats.count(True), repeats.count(False)
    if not many:
        return examples
    if not few:
        left_out[REPEATED] = many
        return examples
    error = f'the answers of {many} rows begin with their prompt, of {few} they do not: all or none must'
    if not skip_bad_rows:
        where = examples[repeats.index(True)].where
        raise UserError(f'{where}: {error}; mend it, or leave the {many} out with --skip_bad_rows ({HELP})')
    left_out[f'bad rows: {error}'] += many
    return [example for example, repeat in zip(examples, repeats, strict=True) if not repeat]


def vanished(source, split, left_out):
    """The error for a source of which no example is left."""
    reasons = dict(+left_out) or 'nothing'
    return UserError(f'no {split} examples are left in data {source!r}; left out: {reasons} ({HELP})')


def hub_splits(hub_id):
    """The names of a hub dataset's splits."""
    import datasets

    try:
        return datasets.get_dataset_split_names(hub_id, **_revision(hub_id))
    except Exception as error:  # no network, no such dataset, no access
        raise UserError(f'cannot find {hub_id!r} on the hub: {_reason(error)}') from None


@cache
def hub_commit(hub_id):
    """The commit at which this process reads a hub dataset; None where nobody can say: no network, no such dataset."""
    try:
        import huggingface_hub

        return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    except Exception:  # the reader, which comes later, says what is wrong
        return None


def _revision(hub_id):
    commit = hub_commit(hub_id)
    return {} if commit is None else {'revision': commit}


def _reason(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def fingerprint(source, split):
    """A string that changes with the content of a source, or None where that cannot be told without reading it all.

    Of files: their names and contents. Of a hub dataset: its commit, at which it is also read."""
    _, path, hub_id = locate(source)
    if source == 'toy':
        return 'toy 1'
    digest = hashlib.sha256(source.encode())
    if path is None:
        commit = hub_commit(hub_id) if hub_id else None
        digest.update(f'{hub_id}@{commit}'.encode())
        return digest.hexdigest() if commit else None
    for file in data_files(path):
        digest.update(os.path.relpath(file, path).encode())  # it says which split a file is of
        try:
            with open(file, 'rb') as stream:
                digest.update(hashlib.file_digest(stream, 'sha256').digest())
        except OSError as error:
            raise UserError(f'cannot read {file}: {error.strerror}') from None
    return digest.hexdigest()


def content_hash(*parts) -> int:
    """A 64-bit hash of json-able values, the same in every process."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'big')


def read_rows(hub_id, split, path, undivided=False, **kwargs):
    """Rows of a local file, of a local folder's files for this split (undivided: of all its files), or of a hub dataset."""
    if path is None:
        import datasets

        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        if hub_id != 'json':  # which reads files of any repository
            kwargs |= _revision(hub_id)
        try:
            rows = datasets.load_dataset(hub_id, split=split, **kwargs)
        except Exception as error:  # no network, no such dataset, no such split: the library's own words say which
            raise UserError(f'cannot load {hub_id!r}, split {split!r}, from the hub: {_reason(error)}') from None
        for i, raw in enumerate(rows):
            yield _row(_unfilled(raw), f'{hub_id} [{split}], row {i + 1}')
        return
    for file in local_files(path, None if undivided else split):
        yield from _read_file(file)


def local_files(path, split):
    """A file itself, or a folder's data files whose path names this split; None: all of them."""
    files = data_files(path)
    if len(files) == 1:  # of which a part is held out
        return files
    for name in (split, split.partition('_')[0]) if split else ['']:  # train_prefs, where there is one, else train
        named = [
            f for f in files if re.search(rf'(?<![a-z]){name}', f[len(path) :].lower())
        ]  # latest.json is no test file
        if named:
            return named
    found = ', '.join(os.path.relpath(f, path)[:40] for f in files[:5]) or 'none at all'
    raise UserError(
        f'the folder {path} has no {split or "data"} file; found of data files: {found}; they end in {", ".join(ENDINGS)} '
        f'and have the split in their name: rename them, or name a single file ({HELP})'
    )


def data_files(path):
    """A file itself, or all data files in a folder."""
    if not os.path.exists(path):
        raise UserError(f'there is no file or folder {path}')
    if os.path.isfile(path):
        return [path]
    return sorted(str(f) for f in Path(path).rglob('*') if f.name.endswith(ENDINGS) and f.is_file())


def _row(raw, where, error=''):
    row = Row(raw if isinstance(raw, dict) else {})
    row.where, row.error = where, error or ('' if isinstance(raw, dict) else 'not an object with named fields')
    return row


def _unfilled(raw):
    """A row of a columnar file without the nulls inside its lists: there every message has the fields of all others."""
    return {key: _without_nulls(value) if isinstance(value, list) else value for key, value in raw.items()}


def _without_nulls(value):
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _read_file(file):
    if not file.endswith(ENDINGS):
        raise UserError(f'{file}: data files end in {", ".join(ENDINGS)}: convert it to one of them ({HELP})')
    try:
        if file.endswith('.parquet'):
            import pyarrow.parquet

            for i, raw in enumerate(pyarrow.parquet.read_table(file).to_pylist()):
                yield _row(_unfilled(raw), f'{file}, row {i + 1}')
            return
        with (gzip.open if file.endswith('.gz') else open)(file, 'rb') as stream:
            if file.endswith(('.json', '.json.gz')):
                text = stream.read().decode('utf-8-sig')  # not json's own guess of an encoding
                lines = text.lstrip().split('\n', 1)
                if not (lines[0].startswith('{') and lines[0].rstrip().endswith('}') and len(lines) > 1):
                    content = json.loads(text)
                    if not isinstance(content, list):
                        raise UserError(f'{file}: not a list of rows')
                    for i, raw in enumerate(content):
                        yield _row(raw, f'{file}, row {i + 1}')
                    return
                stream = io.BytesIO(text.encode())  # a row a line after all, as SHP's files have them
            for i, line in enumerate(stream):
                if not line.strip():
                    continue
                where = f'{file}, line {i + 1}'
                try:
                    raw = json.loads(line.decode('utf-8' if i else 'utf-8-sig'))
                except (ValueError, RecursionError) as error:
                    yield _row({}, where, f'not valid JSON ({getattr(error, "msg", error)})')
                else:
                    yield _row(raw, where)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f'{file}, line {error.lineno}: not valid JSON ({error.msg})') from None
    except (OSError, EOFError, ValueError, RecursionError, NotImplementedError, ImportError, zlib.error) as error:
        raise UserError(f'cannot read {file}: {getattr(error, "strerror", None) or error}') from None


# ---- any source in a documented format ----

ASSISTANT = '\n\nAssistant:'
QUESTIONS = ('prompt', 'question', 'instruction', 'query', 'input')  # the columns that may ask: the first one there is
ADDED = ('input', 'context')  # what an instruction or a question is about, written behind it
ANSWERS = ('response', 'completion', 'output', 'answer')
CHATS = ('messages', 'conversations', 'conversation')
LABELS = ('good', 'label')
TURN_MARKERS = (  # behind the last of these, in a text, stands the answer; the first that a pair has is taken
    ASSISTANT,
    '<|im_start|>assistant\n',
    '<|start_header_id|>assistant<|end_header_id|>\n\n',
    '<start_of_turn>model\n',
    '<|assistant|>\n',
    '[/INST]',
    '### Assistant:',
    '### Response:',
    '\nAssistant:',
    ' ASSISTANT:',
    '\nAnswer:',
    '\nA:',
    '\nTL;DR:',
)


class LeftOut(Exception):
    """A sound row that a rule leaves out: its message is the reason."""


def _with_columns(parse):
    """parse, with what stands in the columns system and tools, and without answers of weight 0."""

    @wraps(parse)
    def parse_whole(row):
        return [example if 'drop' in example else _complete(example, row) for example in parse(row)]

    return parse_whole


def _complete(example, row):
    """An example with its row's system message and tools; what to drop, where an answer has the weight 0."""
    answers = [key for key in ('chosen', 'rejected', 'response') if key in example]
    turns = [turn for key in answers if isinstance(example[key], list) for turn in example[key]]
    if any(turn.get('weight') == 0 for turn in turns):
        return {'drop': 'answers of weight 0, which are not to be trained on'}

    # the weight is for the trainer, not for the template
    for key in ('prompt', *answers):
        if isinstance(example[key], list):
            example[key] = [{k: v for k, v in turn.items() if k != 'weight'} for turn in example[key]]

    system = next((field(row, key) for key in ('system', 'system_prompt') if row.get(key) not in (None, '')), '')
    written = isinstance(example['prompt'], str) and example['prompt'].endswith(TURN_MARKERS)
    if system and not (written and system.strip() in example['prompt']):
        example |= _under_system(example, system, answers)
    tools = _tools(row)
    return example | {'tools': tools} if tools else example


def _under_system(example, system, answers):
    """An example's prompt and answers as chats that begin with this system message."""
    if example['prompt'] in ('', []):
        raise ValueError("there is a 'system' message and no question behind it")
    prompt = as_chat(example['prompt'])
    if prompt[0]['role'] == 'system' and prompt[0]['content'].strip() != system.strip():
        raise ValueError("the column 'system' and the system message of the chat are not the same")
    if prompt[0]['role'] != 'system':
        prompt = [message('system', system), *prompt]
    chats = {'prompt': prompt}
    for key in answers:
        text = example[key]
        chats[key] = [message('assistant', text.strip())] if isinstance(text, str) else text
    return chats


def _tools(row):
    """The column tools, a list of descriptions of functions or that as JSON; None where it has nothing."""
    tools = row.get('tools')
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError("'tools' is neither a list of tools nor one in JSON") from None
    if tools in (None, '', []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is neither a list of tools nor one in JSON")
    _measure('tools', tools)
    return tools


@_with_columns
def parse_any(row):
    """TRL's documented formats, AlpacaEval's annotations, and ours: told apart by their columns, see LAYOUTS."""
    if 'preference' in row and 'output_1' in row:
        return parse_annotation(row)
    row = unified(row)
    read = next((read for columns, read in LAYOUTS if columns <= row.keys()), None)
    if read is None:
        raise ValueError("'prompt' is missing, and no other column is known")
    try:
        return [read(row)]
    except LeftOut as reason:
        return [{'drop': str(reason)}]


def unified(row):
    """A row without nulls, where a chat is a list of {'role', 'content'}, whatever it was written as."""
    return {k: _as_messages(v) for k, v in row.items() if v is not None or k in LABELS}


def _as_messages(value):
    """A list of {'from', 'value'}, or a single message, as a list of {'role', 'content'}; anything else as it is."""
    if isinstance(value, dict) and ('role' in value or 'from' in value):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_as_message(turn) if isinstance(turn, dict) and 'role' not in turn else turn for turn in value]


def _as_message(turn):
    if not isinstance(turn.get('from'), str) or 'value' not in turn:
        return turn
    if turn['from'].strip().lower() not in ROLES:
        raise ValueError(f'a message is from {turn["from"][:24]!r}; known are {", ".join(ROLES)}')
    more = {k: v for k, v in turn.items() if k not in ('from', 'value')}
    return {'role': turn['from'], 'content': turn['value'], **more}


def read_pair(row):
    """Two answers to one prompt, which has a column, or stands before both."""
    prompt, chosen, rejected = asked(row), text_or_chat(row, 'chosen'), text_or_chat(row, 'rejected')
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' is text and 'rejected' is chat, or the reverse")
    more = {} if row.get('margin') is None else {'margin': margin(row)}
    if isinstance(chosen, str) and prompt is None:
        return split_texts(row) | more
    if isinstance(chosen, str):
        prompt, (chosen, rejected), repeats = without_prompt(prompt, chosen, rejected)
        pair = {'chosen': reply(row, prompt, chosen), 'rejected': reply(row, prompt, rejected)}
        return {'prompt': prompt, **pair, **repeats, **more}

    # chats: all turns before the last answer are the prompt, and must be the same for both
    if not chosen or not rejected:
        raise LeftOut('empty answers')
    if (chosen[0]['role'] == 'assistant') != (rejected[0]['role'] == 'assistant'):
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    chosen, rejected = whole_chat(prompt, chosen, 'chosen'), whole_chat(prompt, rejected, 'rejected')
    if len(chosen) == 1 or chosen[0] != rejected[0]:
        raise ValueError("'chosen' and 'rejected' do not begin with the same question")
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut(DIFFERENT)
    return {'prompt': chosen[:-1], 'chosen': chosen[-1:], 'rejected': rejected[-1:], **more}


def read_answer(row):
    """A prompt and an answer, which a label may call good or bad."""
    key = next(column for column in ANSWERS if column in row)
    prompt, response = asked(row), text_or_chat(row, key)
    if prompt is None:
        raise ValueError("'prompt' is missing")
    if isinstance(response, str):
        prompt, (response,), repeats = without_prompt(prompt, response)
        return {'prompt': prompt, 'response': reply(row, prompt, response), **repeats, **thumb(row)}
    if not response:
        raise LeftOut('empty answers')
    turns = whole_chat(prompt, response, key)
    return {'prompt': turns[:-1], 'response': turns[-1:], **thumb(row)}


def read_chat(row):
    """A conversation, of which the last turn is the answer."""
    key = next(column for column in CHATS if column in row)
    field(row, key, list)
    turns = text_or_chat(row, key)
    if len(turns) < 2:
        raise ValueError(f'{key!r} is not a question and its answer')
    return {'prompt': turns[:-1], 'response': turns[-1:], **thumb(row)}


def read_text(row):
    """A text to learn as it stands."""
    text = field(row, 'text')
    nothing_lost(row, 'text', text)
    return {'prompt': '', 'response': text}


def read_prompt(row):
    return {'prompt': asked(row)}


def read_named(name):
    """A layout that one of the named datasets has, and whose reader does more than a row can tell."""

    def read(row):
        raise ValueError(f'these are columns of the dataset {name!r}: say so with --data={name}:PATH')

    return read


LAYOUTS = (  # columns -> how a row that has them all is read; the first that fits
    ({'history', 'human_ref_A'}, read_named('shp')),
    ({'question', 'answers'}, read_named('se')),
    ({'message_id', 'parent_id'}, read_named('oasst')),
    ({'chosen'}, read_pair),
    ({'rejected'}, read_pair),
    ({'response'}, read_answer),
    ({'completion'}, read_answer),
    ({'messages'}, read_chat),
    ({'conversations'}, read_chat),
    ({'conversation'}, read_chat),
    ({'instruction', 'output'}, read_answer),
    ({'input', 'output'}, read_answer),
    ({'question', 'answer'}, read_answer),
    ({'text'}, read_text),
    ({'prompt'}, read_prompt),
    ({'question'}, read_prompt),
    ({'instruction'}, read_prompt),
    ({'query'}, read_prompt),
)


def asked(row):
    """What the columns of a row ask: text that the answer goes on from, or chat; None where no column asks.

    The text of 'prompt', and whatever ends in a turn marker, stays text; a question or an instruction becomes a message."""
    column = next((c for c in QUESTIONS if c in row), None)
    if column is None:
        chat = next((c for c in CHATS if c in row), None)
        if chat is None:
            return None
        turns = text_or_chat({'prompt': field(row, chat, list)}, 'prompt')
        return None if turns[-1]['role'] == 'assistant' else turns
    prompt = text_or_chat(row, 'prompt') if column == 'prompt' else field(row, column)
    for more in ADDED if column in ('question', 'instruction') else ():
        prompt += '\n\n' + field(row, more) if row.get(more) else ''
    nothing_lost(row, column, prompt if isinstance(prompt, str) else '\n'.join(turn['content'] for turn in prompt))
    if column == 'prompt' or prompt.endswith(TURN_MARKERS):
        return prompt
    return [message('user', prompt)]


def reply(row, prompt, text):
    """The text of an answer; behind a question that has become a message, a message, too."""
    return [message('assistant', text.strip())] if isinstance(prompt, list) and 'prompt' not in row else text


def nothing_lost(row, column, said):
    """Raise ValueError where another column asks, too, and what it says is not in the text `said` of this one."""
    for other in {*QUESTIONS, *ADDED, 'history'} - {column}:
        value = row.get(other)
        if value and not (isinstance(value, str) and value.strip() in said):
            raise ValueError(f'{other!r} asks something, too, which would be lost beside {column!r}')


def thumb(row):
    """{'good': whether the answer is good}, if a column says so."""
    column = next((c for c in LABELS if c in row), None)
    if column is None:
        return {}
    value = row[column]
    if not isinstance(value, NUMBER) or value not in (0, 1):  # True and False are numbers, too
        raise ValueError(f'{column!r} is neither true (1) nor false (0)')
    return {'good': bool(value)}


def split_texts(row):
    """The pair in two whole texts without a prompt of their own, if a turn marker says where the answers begin."""
    chosen, rejected = row['chosen'], row['rejected']
    common = os.path.commonprefix([chosen, rejected])
    marker = ASSISTANT if ASSISTANT in chosen else next((m for m in TURN_MARKERS if m in common), None)
    if marker is None:
        raise ValueError(
            "no column has the prompt, and no turn marker (as '\\n\\nAssistant:') shows where answers begin"
        )
    (example,) = parse_dialogues(row, marker)
    if 'drop' in example:
        raise LeftOut(example['drop'])
    return example


def without_prompt(prompt, *answers):
    """(prompt, answers without it, {'repeats': whether they all began with it}) of answers that are text.

    White space around the prompt may differ. Raises ValueError where only one of two answers repeats it."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]['content']
    bare = asked.strip()
    if not bare:
        return prompt, answers, {}
    if all(answer.startswith(asked) for answer in answers):
        return prompt, [answer[len(asked) :] for answer in answers], {'repeats': True}
    begins = [answer.lstrip().startswith(bare) for answer in answers]
    if all(begins):
        prompt = prompt.rstrip() if isinstance(prompt, str) else prompt
        return prompt, [answer.lstrip()[len(bare) :] for answer in answers], {'repeats': True}
    if any(begins):
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    return prompt, answers, {'repeats': False}


def whole_chat(prompt, answer, key):
    """All turns of a prompt (text, chat or None) and an answer, which may be what follows it, or the whole chat."""
    turns = [] if prompt is None else as_chat(prompt)
    if answer[0]['role'] == 'assistant':
        return turns + answer

    # the whole chat: it begins with the prompt, but for a system message that only one of them has
    system = [] if answer[0]['role'] == 'system' else [turn for turn in turns[:1] if turn['role'] == 'system']
    bare = [turn for turn in turns if turn['role'] != 'system']
    begins = [turn for turn in answer if turn['role'] != 'system'][: len(bare)] == bare
    if not begins and not isinstance(prompt, str):
        raise ValueError(f'{key!r} begins with a question that is not the prompt')
    # a prompt of text may be any of the questions of a longer chat
    if not begins and not any(prompt.strip() in turn['content'] for turn in answer[:-1] if turn['role'] == 'user'):
        raise LeftOut('answers to something else than the prompt')
    return system + answer


def text_or_chat(row, key):
    """row[key]: a string, or a list of chat messages, which end with the assistant's where it is an answer."""
    value = field(row, key, (str, list))
    _measure(key, value)
    if isinstance(value, str):
        return value
    turns = [_turn(turn) for turn in value]
    if key == 'prompt' and not turns:
        raise ValueError("'prompt' has no messages")
    if key != 'prompt' and turns and turns[-1]['role'] != 'assistant':
        raise ValueError(f'{key!r} does not end with an answer, but with a message of the role {turns[-1]["role"]!r}')
    return turns


def _turn(turn):
    """A chat message with all its fields, its role by the name that templates know."""
    role = field(turn, 'role')
    turn = {key: value for key, value in turn.items() if value is not None}
    calls, weight = turn.get('tool_calls', []), turn.get('weight', 1)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("'tool_calls' is not a list of calls")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"the 'weight' of a message is {weight!r}: 1 is trained on and 0 is not, and there is no other"
        )

    # a call, or a thought, may stand alone
    alone = 'content' not in turn and any(turn.get(key) for key in ('tool_calls', *REASONING))
    content = '' if alone else field(turn, 'content')
    return turn | message(ROLES.get(role.strip().lower(), role), content)


def _measure(key, value):
    """Raise ValueError for text, messages or tools that are too long or cannot be written."""
    plain = isinstance(value, str)
    if not plain and not all(isinstance(item, dict) for item in value):
        return  # what is wrong with them is said elsewhere
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > LONGEST:
        raise ValueError(f'{key!r} has {len(text):,} characters; the limit is {LONGEST:,}')
    if not plain and any(set(item) - {'role', 'content'} for item in value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{key!r} has half a surrogate pair in it') from None


def _asked(prompt):
    """A prompt by which its row is held out or not: messages without what stands beside role and content."""
    if isinstance(prompt, str):
        return prompt
    return [message(turn['role'], turn['content']) for turn in prompt]


def margin(row):
    """row['margin'], a finite number."""
    value = field(row, 'margin', NUMBER)
    if isinstance(value, bool) or not abs(value) < 1e30:  # NaN is not less than anything
        raise ValueError("'margin' is not a finite number")
    return float(value)


def get_toy(split, path=None):
    """The toy world's pairs (toy.py)."""
    if path:
        raise UserError(f'the toy world has no files: --data=toy, or --data={path}')
    import toy

    return map(Row, toy.pairs(split, 6000 if split == 'train' else 600)), lambda row: [dict(row)]


# ---- datasets with a format of their own ----

NUMBER = (int, float)


def field(row, key, kind=str):
    """row[key], which must be of this kind."""
    value = row.get(key, ...) if isinstance(row, dict) else ...
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # True is an int, for python
        raise ValueError(f'{key!r} is missing or of the wrong type')
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{key!r} is not a finite number')
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # json can write it, no tokenizer can read it
            raise ValueError(f'{key!r} has half a surrogate pair in it') from None
    return value


def ask(text):
    return '\n\nHuman: ' + text + ASSISTANT


def answer(text):
    return ' ' + text.strip()


def message(role, text):
    return {'role': role, 'content': text}


def as_chat(prompt):
    """A prompt, text or chat, as chat messages: the reverse of Human: / Assistant:, or else one user's message."""
    if not isinstance(prompt, str):
        return prompt
    before, *parts = re.split(r'\n\n(Human|Assistant):', prompt)
    if before.strip() or not parts:
        return [message('user', prompt)]
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    turns = [message(roles[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns[-1] == message('assistant', '') else turns


def instruction(prompt):
    """What a prompt asks, as AlpacaEval has it: of a single question its text alone, else the whole dialogue."""
    if not isinstance(prompt, str):
        turns = [turn for turn in prompt if turn['role'] != 'system']
        return turns[0]['content'] if len(turns) == 1 else '\n\n'.join(f'{t["role"]}: {t["content"]}' for t in turns)
    text = prompt.removeprefix('\n\nHuman: ').removesuffix(ASSISTANT)
    return prompt if ASSISTANT in text or ask(text) != prompt else text


def parse_dialogues(row, marker=ASSISTANT):
    """Two dialogues that differ in their last answer; what precedes it is the prompt."""
    prompt, mark, chosen = field(row, 'chosen').rpartition(marker)
    other, _, rejected = field(row, 'rejected').rpartition(marker)
    if not mark:
        raise ValueError(f'no {marker!r} in the dialogue')
    if prompt != other:  # about 1 in 900 of HH
        return [{'drop': DIFFERENT}]
    return [{'prompt': prompt + mark, 'chosen': chosen, 'rejected': rejected}]


def get_hh(split, path=None, data_dir=None):
    """Anthropic/hh-rlhf: two dialogues that differ in their last answer; what precedes it is the prompt."""
    if path and data_dir and os.path.isdir(os.path.join(path, data_dir)):
        path = os.path.join(path, data_dir)

    return read_rows(HUB['hh'], split, path, data_dir=data_dir), parse_dialogues


def get_hh_helpful(split, path=None):
    return get_hh(split, path, data_dir='helpful-base')


def get_hh_harmless(split, path=None):
    return get_hh(split, path, data_dir='harmless-base')


def shp_pair(row):
    """[(prompt, (score, chosen), (score, rejected))], or [] where neither score is at least twice the other."""
    a, b = ((field(row, 'score_' + x, NUMBER), answer(field(row, 'human_ref_' + x))) for x in 'AB')
    if field(row, 'labels', int) not in (0, 1):
        raise ValueError("'labels' is neither 0 nor 1")
    good, bad = (a, b) if row['labels'] else (b, a)  # 1: A is preferred
    return [(ask(field(row, 'history')), good, bad)] if max(a[0], b[0]) >= 2 * min(a[0], b[0]) else []


def get_shp(split, path=None):
    """stanfordnlp/SHP: pairs with a score ratio of 2 or more; SFT on the best answer in a prompt's kept pairs."""
    best = {}  # prompt -> (score, answer), the first of the highest
    for row in read_rows(HUB['shp'], split, path):
        with suppress(ValueError):  # broken rows are reported on the second reading
            for prompt, good, bad in shp_pair(row):
                best[prompt] = max(best.get(prompt, good), good, bad, key=itemgetter(0))

    def parse(row):
        return [
            {'prompt': prompt, 'chosen': good[1], 'rejected': bad[1], 'sft': best[prompt][1]}
            for prompt, good, bad in shp_pair(row)
        ] or [{'drop': 'score ratio below 2'}]

    return read_rows(HUB['shp'], split, path), parse


class Stripper(HTMLParser):
    """Strips HTML: .text keeps paragraphs, list items, <code> tags and the text of links; all other tags go."""

    blocks = {'p', 'pre', 'ul', 'ol', 'blockquote', 'div', 'hr', 'table', 'tr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6'}
    text, pre = '', False

    def handle_starttag(self, tag, attrs):
        self.pre = self.pre or tag == 'pre'
        if tag in self.blocks and not self.text.endswith('\n- '):  # '\n- ': a paragraph may open a list item
            self.text = self.text.rstrip() + '\n\n'
        elif tag == 'li':
            self.text = self.text.rstrip() + '\n- '
        self.text += {'code': '<code>', 'br': '\n'}.get(tag, '')

    def handle_endtag(self, tag):
        self.pre = self.pre and tag != 'pre'
        self.text = self.text.rstrip() + '\n\n' if tag in self.blocks else self.text + '</code>' * (tag == 'code')

    def handle_data(self, data):
        if not self.pre:  # outside code blocks, white space means nothing
            data = re.sub(r'\s+', ' ', data)
            data = data.lstrip() if self.text[-1:] in ('', ' ', '\n') else data
        self.text += data


def strip_html(html):
    stripper = Stripper()
    try:
        stripper.feed(html)
        stripper.close()
    except AssertionError as error:  # the library's word for what it cannot read
        raise ValueError(f'broken HTML ({error})') from None
    return stripper.text.strip()


def get_se(split, path=None):
    """HuggingFaceH4/stack-exchange-preferences: all pairs of a question's answers by pm_score; SFT on the best one."""

    def parse(row):
        prompt, answers = ask(strip_html(field(row, 'question'))), field(row, 'answers', list)
        answers = [(field(x, 'pm_score', NUMBER), answer(strip_html(field(x, 'text')))) for x in answers]
        best = max(answers, key=itemgetter(0), default=(0, ''))[1]
        pairs = [sorted(pair, key=itemgetter(0), reverse=True) for pair in combinations(answers, 2)]
        return [
            {'prompt': prompt, 'chosen': good, 'rejected': bad, 'sft': best} if high > low else {'drop': 'tie'}
            for (high, good), (low, bad) in pairs
        ] or [{'drop': 'fewer than two answers'}]

    return read_rows(HUB['se'], 'train', path, undivided=True), parse


def get_sharegpt(split, path=None, num_turns=1):
    """ShareGPT, Vicuna's cleaned file: a conversation's first num_turns answers, each after all before it."""

    def parse(row):
        turns = [(field(turn, 'from'), field(turn, 'value')) for turn in field(row, 'conversations', list)]
        if any(token in value for _, value in turns for token in ('<s>', '</s>', '<|endoftext|>')):
            return [{'drop': 'special token in the text'}]
        prompt, examples = '', []
        for (asker, question), (replier, reply) in zip(
            turns[: 2 * num_turns : 2], turns[1 : 2 * num_turns : 2], strict=False
        ):
            if (asker, replier) != ('human', 'gpt'):  # pieces of long chats may begin with an answer
                break
            examples.append({'prompt': prompt + ask(question), 'response': answer(reply)})
            prompt += ask(question) + answer(reply)
        return examples or [{'drop': 'does not begin with human, gpt'}]

    return read_rows(
        HUB['sharegpt'],
        'train',
        path,
        undivided=True,
        data_files='ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json',
    ), parse


def get_imdb(split, path=None):
    """insub/imdb_prefix20_forDPO_...: a review's first tokens and two sampled continuations, positive first."""

    def parse(row):
        prompt, chosen, rejected = (field(row, key) for key in ('text', 'chosen', 'rejected'))
        if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            raise ValueError("the answers do not begin with 'text'")
        return [{'prompt': prompt, 'chosen': chosen[len(prompt) :], 'rejected': rejected[len(prompt) :]}]

    return read_rows(HUB['imdb'], split, path), parse


def get_oasst(split, path=None):
    """OpenAssistant/oasst1, English: each ranked answer against the next better one, after the conversation so far."""
    rows = list(read_rows(HUB['oasst'], {'train': 'train', 'test': 'validation'}[split], path))
    by_id, by_rank = {}, {}
    for row in rows:
        with suppress(ValueError):  # as above
            parent, by_id[field(row, 'message_id')] = field(row, 'parent_id', (str, type(None))), row
            if field(row, 'lang') == 'en' and parent:
                by_rank[parent, field(row, 'rank', int)] = row

    def parse(row):
        if field(row, 'lang') != 'en':
            return [{'drop': 'not English'}]
        if field(row, 'role') not in ('prompter', 'assistant'):
            raise ValueError("'role' is neither prompter nor assistant")
        if row['role'] == 'assistant' and row.get('rank') is None:
            return [{'drop': 'an answer without a rank'}]
        if row['role'] == 'prompter' or field(row, 'rank', int) == 0:
            return []  # what is asked stands above the answers; rank 0, the best, takes part as the better one of rank 1
        turns, parent = [], field(row, 'parent_id')
        better = by_rank.get((parent, field(row, 'rank', int) - 1))
        if better is None:
            return [{'drop': 'no answer of the next better rank'}]
        while parent is not None:
            if parent not in by_id or len(turns) == 100:
                raise ValueError('the conversation above the answer is not whole')
            role = 'assistant' if by_id[parent].get('role') == 'assistant' else 'user'
            turns.insert(0, message(role, field(by_id[parent], 'text')))
            parent = by_id[parent].get('parent_id')
        chosen, rejected = ([message('assistant', field(x, 'text'))] for x in (better, row))
        return [{'prompt': turns, 'chosen': chosen, 'rejected': rejected}]

    return rows, parse


def parse_ultrafeedback(row):
    chosen, rejected = field(row, 'chosen', list), field(row, 'rejected', list)
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise ValueError('chosen and rejected have different prompts')
    for answered in (chosen[-1], rejected[-1]):
        if field(answered, 'role') != 'assistant':
            raise ValueError("'chosen' or 'rejected' does not end with an answer")
    if [field(turn, 'content') for turn in chosen[:-1]] != [field(row, 'prompt')]:
        return [{'drop': 'answers to something else than the prompt'}]
    chosen, rejected = ([message('assistant', field(x[-1], 'content'))] for x in (chosen, rejected))
    return [{'prompt': [message('user', field(row, 'prompt'))], 'chosen': chosen, 'rejected': rejected}]


def get_ultrafeedback(split, path=None):
    """HuggingFaceH4/ultrafeedback_binarized: the best of four answers, by GPT-4, against one of the other three."""
    return read_rows(HUB['ultrafeedback'], split + '_prefs', path), parse_ultrafeedback


def get_ultrafeedback_hybrid(split, path=None):
    """wzhouad/gemma-2-ultrafeedback-hybrid: the same fields."""
    return read_rows(HUB['ultrafeedback_hybrid'], split, path), parse_ultrafeedback


def get_ultrachat(split, path=None):
    """HuggingFaceH4/ultrachat_200k: the first exchange of each conversation."""

    def parse(row):
        turns = [message(field(turn, 'role'), field(turn, 'content')) for turn in field(row, 'messages', list)[:2]]
        if [turn['role'] for turn in turns] != ['user', 'assistant']:
            return [{'drop': 'does not begin with user, assistant'}]
        return [{'prompt': turns[:1], 'response': turns[1:]}]

    return read_rows(HUB['ultrachat'], split + '_sft', path), parse


def get_alpaca_eval(split, path=None):
    """tatsu-lab/alpaca_eval: instructions, for sampling only. (The hub has a loading script there, so its json file is read.)"""
    commit = None if path else hub_commit(HUB['alpaca_eval'])
    repository = HUB['alpaca_eval'] + (f'@{commit}' if commit else '')
    file = f'hf://datasets/{repository}/alpaca_eval.json'
    rows = read_rows('json', 'train', path, undivided=True, data_files=file)
    return rows, lambda row: [{'prompt': ask(field(row, 'instruction'))}]


def parse_annotation(row):
    outputs = [field(row, 'output_' + x) for x in '12']
    if 'prompt' in row:  # label.py keeps what is not '\n\nHuman: instruction\n\nAssistant:' as it is
        prompt = text_or_chat(row, 'prompt')
    else:
        prompt, outputs = ask(field(row, 'instruction')), [answer(x) for x in outputs]
    if row.get('preference') is None or row['preference'] != row['preference']:  # null or NaN
        return [{'drop': 'no verdict'}]
    preference = field(row, 'preference', NUMBER)
    if preference in (0, 1.5):
        return [{'drop': 'tie'}]
    if not 1 <= preference <= 2:
        raise ValueError("'preference' is not 0, null, or from 1 to 2")
    chosen, rejected = outputs if preference < 1.5 else outputs[::-1]
    return [{'prompt': prompt, 'chosen': chosen, 'rejected': rejected}]


def get_annotations(split, path=None):
    """AlpacaEval's annotations.json: preference below 1.5 means output_1, above it output_2; 0 and 1.5 are ties."""
    if path is None:
        raise UserError('annotations is a local file: --data=annotations:PATH')
    return read_rows(None, 'train', path, undivided=True), parse_annotation
