"""The next steps are prepared in a thread, while this one is computed."""

from concurrent.futures import ThreadPoolExecutor

import torch

from runtime import guard


def prefetch(iterator, depth=2):
    """The items of an iterator, prepared ahead in a thread; its exceptions are raised here."""
    # a thread begins on the first GPU of the machine, whichever its process has chosen
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    thread = ThreadPoolExecutor(1, initializer=lambda: gpu is None or torch.cuda.set_device(gpu))
    end = object()
    coming = [thread.submit(next, iterator, end) for _ in range(depth)]
    while True:
        try:
            item = coming.pop(0).result()
        except Exception as error:
            raise guard.explained(error, 'the next batches do not fit beside this one; lower max_tokens') from None
        if item is end:
            return
        coming.append(thread.submit(next, iterator, end))
        yield item
