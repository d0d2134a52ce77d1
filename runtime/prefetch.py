"""Prepare the next training steps in a background thread."""

from concurrent.futures import ThreadPoolExecutor

import torch

from runtime import guard


def prefetch(iterator):
    """Yield the items of an iterator, while a thread computes the next two.

    The iterator's exceptions are raised here, as UserError if memory is full."""
    # new threads default to the first GPU
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def choose_gpu():
        if gpu is not None:
            torch.cuda.set_device(gpu)

    # a single thread keeps the order; next() returns end after the last item
    thread = ThreadPoolExecutor(1, initializer=choose_gpu)
    end = object()
    futures = [thread.submit(next, iterator, end) for _ in range(2)]
    while True:
        try:
            item = futures.pop(0).result()
        except Exception as error:
            raise guard.explained(error, 'the next batches do not fit beside this one; lower max_tokens') from None
        if item is end:
            return
        # start the next item before the caller uses this one
        futures.append(thread.submit(next, iterator, end))
        yield item
