"""Loss-adjusted prioritised replay: transitions with large TD errors are drawn more often.

Fujimoto et al., 2020, "An Equivalence between Loss Functions and Non-Uniform Sampling in Experience Replay", arXiv:2007.06049.
"""

from typing import Any

import numpy as np
import torch

from steadyrl.replay_buffer import ReplayBuffer, Sampling

EXPONENT = 0.4  # the paper's alpha
LOWEST = 1.0  # the Huber loss is a square below a TD error of 1: these are drawn uniformly
TOP = 4096  # sums at the top of the tree


class PrioritizedSampling(Sampling):
    """Draws each transition with a probability in proportion to max(|TD error|^0.4, 1); a new one has the highest so far.

    Where priorities differ, the gradient of the Huber loss has a constant size. So what is minimised is another loss that is
    known, and no importance weights are needed.

    `sums` is a binary tree: node n is the sum of nodes 2n and 2n + 1, and the priorities are its leaves. It ends below its root
    in a row of nodes whose cumulative sum is computed for each sample, which is faster than more levels. What is to be written
    waits for the next sample. So a device is waited for once per update, when its result is needed.
    """

    def begin(self, rb: ReplayBuffer) -> None:
        super().begin(rb)
        self.leaves = 1 << (rb.buffer_size * rb.n_envs - 1).bit_length()  # a power of 2
        self.top = min(TOP, self.leaves)
        self.sums = np.zeros(2 * self.leaves)
        self.highest = LOWEST
        self.new_rows = 0  # stored since the last sample
        self.drawn, self.td_errors = np.empty(0, np.int64), torch.empty(0)  # of the last sample; no errors if they are written

    def stored(self, ended: np.ndarray) -> None:
        self.new_rows = min(self.new_rows + 1, self.rb.buffer_size)

    def draw(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        self.write_priorities()
        top = self.sums[self.top : 2 * self.top]
        ends = top.cumsum()
        values = self.rb.random.random_sample(batch_size) * ends[-1]
        nodes = np.minimum(ends.searchsorted(values, side="right"), self.top - 1)
        values -= ends[nodes] - top[nodes]
        nodes += self.top
        while nodes[0] < self.leaves:  # down: to the left, or past what is there to the right
            nodes *= 2
            left = self.sums[nodes]
            right = values >= left
            values -= left * right
            nodes += right
        # By rounding, a value may be just above the sum of all: it is the last transition's.
        self.drawn = np.minimum(nodes - self.leaves, self.rb.size() * self.rb.n_envs - 1)
        rows, envs = np.divmod(self.drawn, self.rb.n_envs)
        return rows, envs

    def prioritize(self, td_errors: torch.Tensor) -> None:
        self.td_errors = td_errors

    def write_priorities(self) -> None:
        """Bring the tree up to date: with the TD errors of the last sample, then with what was stored after it."""
        priorities = np.maximum(self.td_errors.double().abs().cpu().numpy() ** EXPONENT, LOWEST)  # waits for the device
        self.highest = max(self.highest, priorities.max(initial=LOWEST))
        rows = (self.rb.pos - self.new_rows + np.arange(self.new_rows)) % self.rb.buffer_size
        new = (rows[:, None] * self.rb.n_envs + np.arange(self.rb.n_envs)).flatten()
        nodes = np.concatenate([self.drawn[: len(priorities)], new]) + self.leaves
        self.sums[nodes] = np.concatenate([priorities, np.full(len(new), self.highest)])  # of equal nodes, the last one counts
        while len(nodes) and nodes[0] >= 2 * self.top:
            nodes >>= 1
            pairs = self.sums.reshape(-1, 2).take(nodes, axis=0)  # their children
            self.sums[nodes] = pairs[:, 0] + pairs[:, 1]
        self.new_rows, self.td_errors = 0, self.td_errors[:0]

    def state_dict(self) -> dict[str, Any]:
        self.write_priorities()
        priorities = self.sums[self.leaves : self.leaves + self.rb.size() * self.rb.n_envs]
        return {"priorities": torch.from_numpy(priorities), "highest_priority": float(self.highest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums[:] = 0
        self.sums[self.leaves : self.leaves + len(state["priorities"])] = state["priorities"].numpy()
        start = self.leaves
        while start > self.top:  # level by level
            start //= 2
            self.sums[start : 2 * start] = self.sums[2 * start : 4 * start : 2] + self.sums[2 * start + 1 : 4 * start : 2]
        self.highest, self.new_rows, self.td_errors = state["highest_priority"], 0, torch.empty(0)
