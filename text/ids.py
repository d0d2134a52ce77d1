"""Pieces of text to token ids: special tokens that somebody has written stay text; BOS, end of text, and cuts to a length."""


def first_of(tokenizer):
    """BOS where the tokenizer itself would put one, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer('a')['input_ids'][:1] == [bos] else None


def begin(prompt, first, eos):
    """A prompt's ids behind BOS, if it has one; an empty prompt is the end of text before."""
    if prompt and first in (None, prompt[0]):
        return prompt
    return [eos if first is None else first, *prompt]


def cut(prompt, length, first, truncation):
    """The last (or, truncation 'end', the first) tokens of a prompt, BOS kept."""
    head = [] if first is None else prompt[:1]
    return [*head, *prompt[len(prompt) - length + len(head) :]] if truncation == 'start' else prompt[:length]


def fit(p, a, first, eos, max_length, max_prompt_length, truncation, left_out):
    """The ids of a prompt, and of its answers, with BOS and the end of text, cut to the lengths."""
    p = begin(p, first, eos)
    a = [x if x[-1:] == [eos] else [*x, eos] for x in a]
    # too long: first the prompt is cut, then each answer to the room that is left
    if len(p) + max(map(len, a)) > max_length:
        if len(p) > max_prompt_length:
            left_out['prompts cut'] += 1
            p = cut(p, max_prompt_length, first, truncation)
        room = max_length - len(p)
        left_out['answers cut'] += sum(len(x) > room for x in a)
        a = [x if len(x) <= room else [*x[: room - 1], eos] for x in a]
    return p, a


def fit_conversation(ids, trained, first, eos, max_length, max_prompt_length, truncation, left_out):
    """[prompt, answer] of a conversation, where a token that is only seen is ~id; None, counted, if nothing is left.

    ids: of its segments; trained: which of them are trained on (turns.py). The prompt is what comes before the first answer.
    A conversation that is too long loses its end."""
    prompt, answer = begin(ids[0], first, eos), []
    for segment, is_used in zip(ids[1:], trained[1:], strict=True):
        answer += segment if is_used else [~i for i in segment]
    # a template may mark the line break behind its end of turn, too
    answer += [] if eos in answer[-2:] else [eos]

    if len(prompt) + len(answer) > max_length:
        if len(prompt) > max_prompt_length:
            left_out['prompts cut'] += 1
            prompt = cut(prompt, max_prompt_length, first, truncation)
        room = max_length - len(prompt)
        left_out['conversations cut'] += len(answer) > room
        # what the user says at the end trains nothing; the last answer ends as any does
        is_cut, answer = len(answer) > room, answer[:room]
        while answer and answer[-1] < 0:
            answer.pop()
        if is_cut and answer and eos not in answer[-2:]:
            answer = [*answer[: room - 1], eos]
    if not answer:
        left_out['conversations without an answer within max_length'] += 1
        return None
    return [prompt, answer]


def encode_texts(texts, tokenizer, left_out):
    """The token ids of texts, each a list of pieces."""
    # all that are of one piece at once
    single = [pieces[0] for pieces in texts if len(pieces) == 1]
    ids = iter(_encode_plain(single, tokenizer) if single else [])
    return [next(ids) if len(pieces) == 1 else _encode_pieces(pieces, tokenizer, left_out) for pieces in texts]


def _encode_plain(texts, tokenizer):
    """The token ids of texts, without special tokens around them."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)['input_ids']
    # this way where each token begins in its text is not kept; the call before takes truncation and padding off
    tokenizer(texts[0], add_special_tokens=False)
    return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _encode_pieces(pieces, tokenizer, left_out):
    """The token ids of pieces in a row, each encoded behind a line break that is taken away again: some tokenizers put a
    space before what begins a text. (The same as sanitize_control_tokens of transformers 5.23.)"""

    def as_tokens(text):
        return tokenizer(text, add_special_tokens=False)['input_ids']

    def as_text(text):
        return _ids_of_text(text, tokenizer)

    def behind_line(encoder, text):
        more = encoder('\n' + text)
        return more[len(line) :] if more[: len(line)] == line else encoder(text)

    # every second piece is a special token that is written as text
    ids, line = as_tokens(pieces[0]), as_tokens('\n')
    for i, piece in enumerate(pieces[1:], 1):
        if not piece:
            continue
        if i % 2 == 0:
            ids = ids + behind_line(as_tokens, piece)
            continue
        token, more = tokenizer.convert_tokens_to_ids(piece), behind_line(as_text, piece)
        # a word of the model, too, as in Unigram: in two parts it is not
        if token in more:
            more = behind_line(as_text, piece[:1]) + behind_line(as_text, piece[1:])
        left_out['special tokens in a text, for which this tokenizer has no other ids'] += token in more
        ids = ids + more
    return ids


def _ids_of_text(text, tokenizer):
    """The ids of a text none of which is an added token, special or not."""
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    inner, words = tokenizer.backend_tokenizer, [text]
    if inner.normalizer is not None:
        words = [inner.normalizer.normalize_str(text)]
    if inner.pre_tokenizer is not None:
        words = [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(words[0])]
    return [token.id for word in words for token in inner.model.tokenize(word)]
