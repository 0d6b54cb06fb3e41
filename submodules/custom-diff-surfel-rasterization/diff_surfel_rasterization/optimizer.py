"""`Adam`: torch's, with one kernel on a GPU for all parameters together (csrc/cuda/adam.h).

torch's own fused step is a launch for each group of parameters and gives 65 536 numbers of an array to a block, so that a head's
nine groups take 0.06 ms each, on a GPU that moves the whole of them in 0.03.
"""

import torch
from torch import Tensor

from . import cuda


class Adam(torch.optim.Adam):
    """torch.optim.Adam(fused=True), its state the same, of parameters of one dtype on one device, with the same `betas`
    and `eps` for all groups.

    On a GPU learning rates must be float32 scalars there, so that a recorded graph reads what they are then. `found_inf` may be
    set to a float32 scalar on the device: while it is not 0, steps change nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, params, lr: float | Tensor = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15):
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One step, by torch on a CPU."""
        if not self.param_groups[0]["params"][0].is_cuda:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_by(cuda.back_end)
        return loss

    def step_by(self, back_end: cuda.BackEnd) -> None:
        """The step as one kernel."""
        arrays = []
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=p.device)
                arrays.append((p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], rate, state["step"]))
        if arrays:
            done = [torch.ones((), device=arrays[0][0].device) if self.found_inf is None else 1 - self.found_inf]
            torch._foreach_add_([row[-1] for row in arrays], done * len(arrays))  # one number for all would be read by the host
            back_end.adam(arrays, self.defaults["betas"], self.defaults["eps"], self.found_inf)
