"""The next steps are prepared in a thread, while this one is computed."""

from concurrent.futures import ThreadPoolExecutor

import torch

from runtime import guard


def prefetch(iterator, depth=2):
    """Yield the items of an iterator, of which a thread prepares up to depth ahead.

    An exception of the iterator is raised here, when its item is due. Raises UserError if memory is full."""
    # a new thread begins on the machine's first GPU, whichever this process uses
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def choose_gpu():
        if gpu is not None:
            torch.cuda.set_device(gpu)

    # one thread, so that the items come in their order. next returns end behind the last item
    thread = ThreadPoolExecutor(1, initializer=choose_gpu)
    end = object()
    coming = [thread.submit(next, iterator, end) for _ in range(depth)]
    while True:
        try:
            item = coming.pop(0).result()
        except Exception as error:
            raise guard.explained(error, 'the next batches do not fit beside this one; lower max_tokens') from None
        if item is end:
            return
        # the next one is begun before this one is used
        coming.append(thread.submit(next, iterator, end))
        yield item
