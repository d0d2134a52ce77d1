"""Attention of packed answers on CUDA in half precision: one kernel for all, which reads each answer's prompt and itself in a row."""

import inspect

import numpy as np
import torch


class Varlen:
    """What the CUDA kernel needs: queries in row order; keys gathered so that each answer has its prompt before it.

    gather (K,): the row of each key, or None where every prompt has one answer, and so keys are in row order, too; copies: (rows,
    where in gather they stand) of all first copies, of all second ones, ... cu_q, cu_k (A + 1,): where each answer's queries and
    keys begin and end; max_q, max_k: the longest of them."""

    def __init__(self, groups):
        gather, start = [], 0
        n_queries, n_keys = [], []  # of each answer
        for prompt, answers in groups:
            prompt_places = np.arange(start, start + prompt)
            start += prompt
            # the prompt's queries go with the first answer
            n_queries += [prompt + answers[0], *answers[1:]]
            n_keys += [prompt + answer for answer in answers]
            for answer in answers:
                gather += [prompt_places, np.arange(start, start + answer)]
                start += answer
        # every prompt stands there as often as it has answers
        self.gather, self.copies = None, []
        if any(len(answers) > 1 for _, answers in groups):
            places = np.concatenate(gather)
            self.gather, left = torch.from_numpy(places), np.arange(len(places))
            while len(left):
                rows, at = np.unique(places[left], return_index=True)
                self.copies.append((torch.from_numpy(rows), torch.from_numpy(left[at])))
                left = np.delete(left, at)
        # the kernel's offsets are 32 bits wide
        edges = [np.cumsum([0, *lengths]) for lengths in (n_queries, n_keys)]
        self.cu_q, self.cu_k = (torch.tensor(x, dtype=torch.int32) for x in edges)
        self.max_q, self.max_k = max(n_queries), max(n_keys)


def attention(query, key, value, scaling, sliding_window, layout):
    """What model.packed_attention returns, from one kernel: (T, H, D). layout: Varlen.

    query (1, H, T, D), key and value (1, H_kv, T, D)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    # keys and values: each answer with its prompt before it
    if layout.gather is not None:
        k, v = Gather.apply(k, layout), Gather.apply(v, layout)
    # how many tokens a query sees before its own (-1: all), and behind it
    options = {'scale': scaling, 'window_size': (-1 if sliding_window is None else sliding_window - 1, 0)}
    # heads that share keys: an older torch than 2.13 gets them repeated
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1 and 'enable_gqa' in inspect.signature(varlen_attn).parameters:
        options['enable_gqa'] = True
    elif repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, **options)


class Gather(torch.autograd.Function):
    """Keys or values (T, H, D) -> (K, H, D), in which prompts stand once for each of their answers. layout: Varlen."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return _rows(x, layout.gather)

    @staticmethod
    def backward(ctx, grad):
        # what has no second copy is done with the first; torch's own backward sorts all rows
        (_, first), *others = ctx.layout.copies
        total = _rows(grad.contiguous(), first)
        for rows, at in others:
            total[rows] = _rows(total, rows) + _rows(grad, at)
        return total, None


def _rows(x, index):
    """x[index] for x (T, H, D), read in words of 16 bytes where that is possible: a GPU is three times as fast then."""
    word = 16 // x.element_size()
    if any(n % word for n in (x.storage_offset(), x.shape[-1], *x.stride()[:-1])):
        return x[index]
    return x.view(torch.complex128)[index].view(x.dtype)
