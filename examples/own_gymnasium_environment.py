"""A gymnasium environment of your own: observations of several kinds, discrete actions.

    python examples/own_gymnasium_environment.py
    python experiments/dreamer_dmc.py --task examples.own_gymnasium_environment:make --preset xs \\
        --steps 8000 --agent.actor-grad reinforce --loop.action-repeat 1
"""

import gymnasium
import numpy as np
from gymnasium import spaces

import mbrl.envs
from mbrl.envs.gym import Gymnasium


class Corridor(gymnasium.Env):
    """Walk to the door that the sign names; reward 1 there, 0 elsewhere, for at most 20 steps."""

    observation_space = spaces.Dict(
        {"place": spaces.Box(-1, 1, (1,), np.float32), "sign": spaces.Discrete(2)}
    )
    action_space = spaces.Discrete(3)  # left, stay, right

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0.0, 0
        self.sign = int(self.np_random.integers(2))
        return self.show(), {}

    def step(self, action):
        self.place, self.steps = self.place + 0.25 * (action - 1), self.steps + 1
        arrived = abs(self.place) >= 1
        reward = float(arrived and (self.place > 0) == self.sign)
        return self.show(), reward, arrived, self.steps >= 20, {}

    def show(self):
        return {"place": np.array([self.place], np.float32), "sign": self.sign}


def make(seed: int, action_repeat: int = 1) -> Gymnasium:
    return Gymnasium(Corridor(), seed, action_repeat, "corridor")


if __name__ == "__main__":
    mbrl.envs.check(make)
