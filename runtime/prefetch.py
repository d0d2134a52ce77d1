"""The next steps are prepared in a thread, while this one is computed."""

import queue
import threading

from runtime import guard


def prefetch(iterator, depth=2):
    """The items of an iterator, prepared ahead in a thread; its exceptions are raised here."""
    # (item, error): one of them; (None, None): the end
    items = queue.Queue(depth)

    def work():
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
