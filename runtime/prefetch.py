"""The next steps are prepared in a thread, while this one is computed."""

import queue
import threading

import torch

from runtime import guard


def prefetch(iterator, depth=2):
    """The items of an iterator, prepared ahead in a thread; its exceptions are raised here."""
    # (item, error): one of them; (None, None): the end
    items = queue.Queue(depth)

    # a thread begins on the first GPU of the machine, whichever its process has chosen
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work():
        if gpu is not None:
            torch.cuda.set_device(gpu)
        try:
            for item in iterator:
                items.put((item, None))
            items.put((None, None))
        except BaseException as error:
            items.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = items.get()
        if error is not None:
            raise guard.explained(error, 'the next batches do not fit beside this one; lower max_tokens')
        if item is None:
            return
        yield item
