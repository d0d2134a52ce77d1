"""Packed attention on CUDA in half precision: a single varlen kernel call, in which each answer sees its prompt and itself."""

import inspect

import numpy as np
import torch


class Varlen:
    """A packed row as the varlen kernel wants it: the keys of each answer are its prompt's and its own.

    groups: [(tokens of a prompt, tokens of each answer that shares it)]. Queries stay in row order; a prompt's queries belong to
    its first answer. gather (K,): row of each key, or None if no prompt is shared, since keys are in row order then. copies:
    [(rows, places in gather)] of all first copies, of all second copies, ... cu_q, cu_k: cumulative query and key counts."""

    def __init__(self, groups):
        n_queries, n_keys = [], []  # of each answer
        gather = []
        start = 0  # row index of the next piece
        for prompt, answers in groups:
            prompt_rows = np.arange(start, start + prompt)
            start += prompt
            n_queries += [prompt + answers[0], *answers[1:]]
            n_keys += [prompt + answer for answer in answers]
            for answer in answers:
                gather += [prompt_rows, np.arange(start, start + answer)]
                start += answer
        self.gather, self.copies = None, []
        has_shared_prompt = any(len(answers) > 1 for _, answers in groups)
        if has_shared_prompt:
            gather = np.concatenate(gather)
            self.gather = torch.from_numpy(gather)
            left = np.arange(len(gather))  # places whose copy is not listed yet
            while len(left):
                rows, first = np.unique(gather[left], return_index=True)
                places = left[first]
                self.copies.append((torch.from_numpy(rows), torch.from_numpy(places)))
                left = np.delete(left, first)
        # the kernel takes int32
        self.cu_q = torch.tensor(np.cumsum([0, *n_queries]), dtype=torch.int32)
        self.cu_k = torch.tensor(np.cumsum([0, *n_keys]), dtype=torch.int32)
        self.max_q, self.max_k = max(n_queries), max(n_keys)


def attention(query, key, value, scaling, sliding_window, layout):
    """Return the attention output (T, H, D) of a packed row. query (1, H, T, D); key, value (1, H_kv, T, D); layout: a Varlen."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if layout.gather is not None:
        k, v = Gather.apply(k, layout), Gather.apply(v, layout)
    # number of earlier tokens that a query sees (-1: all), and 0 later ones
    n_before = -1 if sliding_window is None else sliding_window - 1
    options = {'scale': scaling, 'window_size': (n_before, 0)}
    # grouped-query attention: before torch 2.13, repeat the key and value heads
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1 and 'enable_gqa' in inspect.signature(varlen_attn).parameters:
        options['enable_gqa'] = True
    elif repeat > 1:
        k = k.repeat_interleave(repeat, 1)
        v = v.repeat_interleave(repeat, 1)
    return varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, **options)


class Gather(torch.autograd.Function):
    """Keys or values (T, H, D) -> (K, H, D), where each answer has a copy of its prompt before it. layout: a Varlen."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return _rows(x, layout.gather)

    @staticmethod
    def backward(ctx, grad):
        """Sum the gradients of all copies of each row. Indexing's own backward would sort all rows, which is slow."""
        (_, first_places), *further_copies = ctx.layout.copies
        # all rows have a first copy, in row order
        total = _rows(grad.contiguous(), first_places)
        for rows, places in further_copies:
            total[rows] = _rows(total, rows) + _rows(grad, places)
        return total, None


def _rows(x, index):
    """Return x[index] for x (T, H, D), three times as fast on a GPU if it can be read in words of 16 bytes."""
    word = 16 // x.element_size()
    sizes = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
    if any(size % word for size in sizes):
        return x[index]
    # complex128 has 16 bytes
    words = x.view(torch.complex128)
    return words[index].view(x.dtype)
