"""Attention of packed answers on CUDA in half precision: one kernel call, in which each answer reads its prompt and itself."""

import inspect

import numpy as np
import torch


class Varlen:
    """The groups of a packed row as the CUDA kernel wants them: queries and keys of answer after answer.

    Queries stay in row order; a prompt's queries go with its first answer. Keys are gathered, so that each answer has its prompt
    before it: gather (K,) is the row of each key, or None if every prompt has one answer, since keys are in row order then, too.
    copies: see _copies. cu_q, cu_k (A + 1,): where each answer's queries and keys begin, and where the last ones end. max_q and
    max_k: the most queries and keys of an answer."""

    def __init__(self, groups):
        gather = []
        n_queries, n_keys = [], []  # of each answer
        start = 0  # the first row of the next piece
        for prompt, answers in groups:
            prompt_rows = np.arange(start, start + prompt)
            start += prompt
            # an answer's keys are its prompt's and its own
            n_queries += [prompt + answers[0], *answers[1:]]
            n_keys += [prompt + answer for answer in answers]
            for answer in answers:
                gather += [prompt_rows, np.arange(start, start + answer)]
                start += answer

        self.gather, self.copies = None, []
        # only then the keys are in another order than the row
        has_shared_prompt = any(len(answers) > 1 for _, answers in groups)
        if has_shared_prompt:
            rows = np.concatenate(gather)
            self.gather = torch.from_numpy(rows)
            self.copies = _copies(rows)
        # the kernel wants offsets of 32 bits
        self.cu_q = torch.tensor(np.cumsum([0, *n_queries]), dtype=torch.int32)
        self.cu_k = torch.tensor(np.cumsum([0, *n_keys]), dtype=torch.int32)
        self.max_q, self.max_k = max(n_queries), max(n_keys)


def _copies(gather):
    """Return a list of (rows, places): the places in gather of the first copies of all rows, of all second copies, and so on."""
    copies = []
    left = np.arange(len(gather))
    while len(left):
        # of each row that is left, the first place
        rows, first = np.unique(gather[left], return_index=True)
        copies.append((torch.from_numpy(rows), torch.from_numpy(left[first])))
        left = np.delete(left, first)
    return copies


def attention(query, key, value, scaling, sliding_window, layout):
    """Return the attention output (T, H, D) of a packed row, as model.packed_attention needs it.

    query (1, H, T, D), key and value (1, H_kv, T, D). layout: the Varlen of its groups."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if layout.gather is not None:
        k, v = Gather.apply(k, layout), Gather.apply(v, layout)
    # a query sees so many tokens before its own (-1: all of them), and none behind it
    n_before = -1 if sliding_window is None else sliding_window - 1
    options = {'scale': scaling, 'window_size': (n_before, 0)}
    # several heads of queries may share a head of keys: torch before 2.13 needs keys and values repeated
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1 and 'enable_gqa' in inspect.signature(varlen_attn).parameters:
        options['enable_gqa'] = True
    elif repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, **options)


class Gather(torch.autograd.Function):
    """Keys or values (T, H, D) -> (K, H, D), where each answer has a copy of its prompt before it. layout: a Varlen."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return _rows(x, layout.gather)

    @staticmethod
    def backward(ctx, grad):
        """Sum the gradients of all copies of a row, round by round. torch's own backward would sort all rows, which is slow."""
        (_, first_places), *further_copies = ctx.layout.copies
        # every row has a first copy, and these are in row order
        total = _rows(grad.contiguous(), first_places)
        for rows, places in further_copies:
            total[rows] = _rows(total, rows) + _rows(grad, places)
        return total, None


def _rows(x, index):
    """Return x[index] of x (T, H, D), read in words of 16 bytes if possible: then a GPU is three times as fast."""
    word = 16 // x.element_size()
    sizes = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
    has_whole_words = all(size % word == 0 for size in sizes)
    if not has_whole_words:
        return x[index]
    # complex128 is a type of 16 bytes
    return x.view(torch.complex128)[index].view(x.dtype)
