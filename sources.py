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
from functools import wraps
from html.parser import HTMLParser
from itertools import combinations
from operator import itemgetter
from pathlib import Path

from configurator import UserError

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


class Row(dict):
    """A raw row that knows where it stands ('file, line n'), and why it could not be read, if so."""

    where = error = ''


def load_rows(source, split, *, whole=False, num_turns=1, skip_bad_rows=False):
    """The examples of one source ('hh', 'hh:PATH', 'toy', a hub id, a file or folder) -> (list, Counter of reasons).

    split: 'train' or 'test'. A single file, or a dataset without a test split, is divided by a hash of the prompt unless
    whole. The Counter says what was left out. Raises UserError for an unreadable source and, unless skip_bad_rows, for a
    bad row."""
    name, _, path = source.partition(':')
    undivided = False
    getter = globals().get(f'get_{name}')
    if path:
        data_files(path)  # raises if there is none
    if getter:
        rows, parse = getter(split, path or None, **({'num_turns': num_turns} if name == 'sharegpt' else {}))
    elif os.path.exists(source):
        path = source
        rows, parse = read_rows(None, split, path), parse_any
    elif source.endswith(ENDINGS) or source.count('/') != 1:
        known = ', '.join(sorted(n.removeprefix('get_') for n in globals() if n.startswith('get_')))
        raise UserError(f'data {source!r} is no file, no hub id (owner/name) and none of the known datasets: {known}')
    else:
        undivided = 'test' not in hub_splits(source)
        rows, parse = read_rows(source, 'train' if undivided else split, None), parse_any
    divide = not whole and (name in NO_TEST_SPLIT or undivided or (path and len(data_files(path)) == 1))
    examples, left_out = [], Counter()
    for row in rows:
        try:
            if row.error:
                raise ValueError(row.error)
            found = parse(row)
        except (ValueError, RecursionError) as error:  # the latter: nested a thousand deep
            if not skip_bad_rows:
                raise UserError(f'{row.where}: {error}; mend it, or pass --skip_bad_rows') from None
            left_out[f'bad rows: {error}'] += 1
            continue
        for example in found:
            if 'drop' in example:
                left_out[example['drop']] += 1
            elif not divide or (content_hash(_asked(example['prompt'])) % HELD_OUT == 0) == (split == 'test'):
                examples.append(_row(example, row.where))  # tokenise names the row that a chat template refuses
    return examples, left_out


def hub_splits(hub_id):
    """The names of a hub dataset's splits."""
    import datasets

    try:
        return datasets.get_dataset_split_names(hub_id)
    except Exception as error:  # no network, no such dataset, no access
        raise UserError(f'cannot find {hub_id!r} on the hub: {_reason(error)}') from None


def _reason(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def fingerprint(source, split):
    """A string that changes with the content of a source, or None where that cannot be told without reading it all."""
    name, _, path = source.partition(':')
    path = path or (source if os.path.exists(source) else '')
    if name == 'toy':
        return 'toy 1'
    if not path:
        return None  # a hub dataset: the library keeps its own cache of the rows
    digest = hashlib.sha256(source.encode())
    for file in data_files(path):
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

        try:
            rows = datasets.load_dataset(hub_id, split=split, **{k: v for k, v in kwargs.items() if v is not None})
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
    raise UserError(f'the folder {path} has no {split or "data"} file ({", ".join(ENDINGS)}, the split in its name)')


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
        raise UserError(f'{file}: data files end in {", ".join(ENDINGS)}')
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
    if system:
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
    """TRL's documented formats, AlpacaEval's annotations, and ours: told apart by their fields."""
    if 'preference' in row and 'output_1' in row:
        return parse_annotation(row)
    if 'chosen' in row or 'rejected' in row:
        chosen, rejected = text_or_chat(row, 'chosen'), text_or_chat(row, 'rejected')
        if type(chosen) is not type(rejected):
            raise ValueError("'chosen' is text and 'rejected' is chat, or the reverse")
        more = {} if row.get('margin') is None else {'margin': margin(row)}
        if 'prompt' in row:
            prompt = text_or_chat(row, 'prompt')
            return [{'prompt': prompt, 'chosen': _begins(chosen), 'rejected': _begins(rejected), **more}]
        n = next(
            (i for i, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y),
            min(len(chosen), len(rejected)),
        )
        same = chosen[:n]
        if not n and isinstance(chosen, list):
            raise ValueError("'chosen' and 'rejected' do not begin with the same question")
        if isinstance(chosen, str) and not same.endswith((' ', '\n', ':')):  # do not cut a word in two
            n = max(same.rfind(' '), same.rfind('\n'), same.rfind(':') + 1, 0)
        return [{'prompt': chosen[:n], 'chosen': _begins(chosen[n:]), 'rejected': _begins(rejected[n:]), **more}]
    for key in ('response', 'completion'):
        if key in row:
            example = {'prompt': text_or_chat(row, 'prompt'), 'response': _begins(text_or_chat(row, key))}
            label = {'response': 'good', 'completion': 'label'}[key]
            return [example | ({'good': field(row, label, bool)} if label in row else {})]
    if 'messages' in row:
        field(row, 'messages', list)
        turns = text_or_chat(row, 'messages')
        if len(turns) < 2:
            raise ValueError("'messages' is not a question and its answer")
        return [{'prompt': turns[:-1], 'response': turns[-1:]}]
    if 'text' in row:
        return [{'prompt': '', 'response': field(row, 'text')}]
    return [{'prompt': text_or_chat(row, 'prompt')}]


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


def _begins(answer):
    """An answer, which as chat begins with the assistant: else it repeats the prompt, or answers another one."""
    if isinstance(answer, list) and answer and answer[0]['role'] != 'assistant':
        raise ValueError('an answer begins with a question, or answers another one')
    return answer


def margin(row):
    """row['margin'], a finite number."""
    value = field(row, 'margin', NUMBER)
    if isinstance(value, bool) or not abs(value) < 1e30:  # NaN is not less than anything
        raise ValueError("'margin' is not a finite number")
    return float(value)


def get_toy(split, path=None):
    """The toy world's pairs (toy.py)."""
    import toy

    return map(Row, toy.pairs(split, 6000 if split == 'train' else 600)), lambda row: [dict(row)]


# ---- datasets with a format of their own ----

ASSISTANT = '\n\nAssistant:'
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


def get_hh(split, path=None, data_dir=None):
    """Anthropic/hh-rlhf: two dialogues that differ in their last answer; what precedes it is the prompt."""
    if path and data_dir and os.path.isdir(os.path.join(path, data_dir)):
        path = os.path.join(path, data_dir)

    def parse(row):
        prompt, mark, chosen = field(row, 'chosen').rpartition(ASSISTANT)
        other, _, rejected = field(row, 'rejected').rpartition(ASSISTANT)
        if not mark:
            raise ValueError(f'no {ASSISTANT!r} in the dialogue')
        if prompt != other:  # about 1 in 900
            return [{'drop': 'chosen and rejected have different prompts'}]
        return [{'prompt': prompt + mark, 'chosen': chosen, 'rejected': rejected}]

    return read_rows('Anthropic/hh-rlhf', split, path, data_dir=data_dir), parse


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
    for row in read_rows('stanfordnlp/SHP', split, path):
        with suppress(ValueError):  # broken rows are reported on the second reading
            for prompt, good, bad in shp_pair(row):
                best[prompt] = max(best.get(prompt, good), good, bad, key=itemgetter(0))

    def parse(row):
        return [
            {'prompt': prompt, 'chosen': good[1], 'rejected': bad[1], 'sft': best[prompt][1]}
            for prompt, good, bad in shp_pair(row)
        ] or [{'drop': 'score ratio below 2'}]

    return read_rows('stanfordnlp/SHP', split, path), parse


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

    return read_rows('HuggingFaceH4/stack-exchange-preferences', 'train', path, undivided=True), parse


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
        'anon8231489123/ShareGPT_Vicuna_unfiltered',
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

    name = 'insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english'
    return read_rows(name, split, path), parse


def get_oasst(split, path=None):
    """OpenAssistant/oasst1, English: each ranked answer against the next better one, after the conversation so far."""
    rows = list(read_rows('OpenAssistant/oasst1', {'train': 'train', 'test': 'validation'}[split], path))
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
    return read_rows('HuggingFaceH4/ultrafeedback_binarized', split + '_prefs', path), parse_ultrafeedback


def get_ultrafeedback_hybrid(split, path=None):
    """wzhouad/gemma-2-ultrafeedback-hybrid: the same fields."""
    return read_rows('wzhouad/gemma-2-ultrafeedback-hybrid', split, path), parse_ultrafeedback


def get_ultrachat(split, path=None):
    """HuggingFaceH4/ultrachat_200k: the first exchange of each conversation."""

    def parse(row):
        turns = [message(field(turn, 'role'), field(turn, 'content')) for turn in field(row, 'messages', list)[:2]]
        if [turn['role'] for turn in turns] != ['user', 'assistant']:
            return [{'drop': 'does not begin with user, assistant'}]
        return [{'prompt': turns[:1], 'response': turns[1:]}]

    return read_rows('HuggingFaceH4/ultrachat_200k', split + '_sft', path), parse


def get_alpaca_eval(split, path=None):
    """tatsu-lab/alpaca_eval: instructions, for sampling only. (The hub has a loading script there, so its json file is read.)"""
    rows = read_rows(
        'json', 'train', path, undivided=True, data_files='hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json'
    )
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
