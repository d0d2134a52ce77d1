"""Prepare the next training steps in a background thread."""

from concurrent.futures import ThreadPoolExecutor

import torch

from runtime import errors


def prefetch(iterator):
    """Yield an iterator's items while a thread computes the next two. Its exceptions are raised here."""
    # a new thread would use the first GPU; set_device(-1) does nothing
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    # a single thread keeps the order; next() returns end after the last item
    thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(gpu,))
    end = object()
    futures = [thread.submit(next, iterator, end) for _ in range(2)]
    while True:
        try:
            item = futures.pop(0).result()
        except Exception as error:
            raise errors.explained(error, 'the next batches do not fit beside this one; lower max_tokens') from None
        if item is end:
            return
        futures.append(thread.submit(next, iterator, end))  # start the next item before the caller uses this one
        yield item


def move(value, device):
    """Move a tensor, or all tensors in a list or tuple (copied), dict or object (in place), to a device; return the result."""
    if isinstance(value, torch.Tensor):
        # pinned memory makes the copy to a GPU asynchronous
        if torch.device(device).type == 'cuda' and not value.is_cuda:
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        return type(value)(move(part, device) for part in value)
    # other values, such as numbers, have no parts
    parts = value if isinstance(value, dict) else getattr(value, '__dict__', {})
    for name, part in parts.items():
        parts[name] = move(part, device)
    return value
