"""Observations as the networks see them, if --normalize-observations is given."""

import numpy as np
import torch

LIMIT = 10.0  # standard deviations at which a normalised observation is clipped
SMALLEST = 1e-8  # deviation, so that rounding errors are not scaled up to 1


class Normalizer(torch.nn.Module):
    """(x - mean) / standard deviation, clipped, with the statistics of the observations that training has acted on.

    It has no parameters. Its buffers are float64 and stay on the CPU: statistics change with each step of the environments,
    while a device may still be training. They are part of the model, and `normalize` gives the same bits on every device.

    Args:
        size: of an observation.
    """

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))  # the sum of squared distances to the mean

    def observe(self, obs: np.ndarray) -> None:
        """Take (N, O) observations into the statistics (Chan, Golub and LeVeque, 1979, equation 2.1)."""
        count, mean, squares = self.count.numpy(), self.mean.numpy(), self.squares.numpy()  # views: they are changed in place
        new = obs.astype(np.float64)
        distance, total = new.mean(axis=0) - mean, count + len(new)
        squares += ((new - new.mean(axis=0)) ** 2).sum(axis=0) + distance**2 * (count * len(new) / total)
        mean += distance * (len(new) / total)
        count += len(new)

    @property
    def deviation(self) -> torch.Tensor:
        """(O,) standard deviations; 1 as long as there are none."""
        return torch.where(self.squares > 0, (self.squares / self.count).sqrt().clamp(min=SMALLEST), 1.0)

    def normalize(self, obs: np.ndarray) -> np.ndarray:
        """(N, O) observations to (N, O) float32 ones with mean 0 and standard deviation 1."""
        return self.forward(torch.from_numpy(obs)).numpy()

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """`normalize` for tensors."""
        mean, deviation = self.mean.to(obs.device), self.deviation.to(obs.device)
        return ((obs.double() - mean) / deviation).clamp(-LIMIT, LIMIT).float()
