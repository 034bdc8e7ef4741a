"""stable-baselines3: target networks have the statistics of the network that they copy, and a DQN learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import folds
from torch import Tensor, nn

from streamnorm import StreamingNorm

sb3: Any = pytest.importorskip("stable_baselines3")
layers: Any = pytest.importorskip("stable_baselines3.common.torch_layers")
evaluation: Any = pytest.importorskip("stable_baselines3.common.evaluation")
pytestmark = pytest.mark.filterwarnings("ignore")


class Extractor(layers.BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 64)
        parts: list[nn.Module] = []
        for inputs in (space.shape[0], 64):
            parts += [nn.Linear(inputs, 64, bias=False), StreamingNorm(64), nn.ReLU()]
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_dqn_learns_and_its_target_has_its_statistics() -> None:
    model = sb3.DQN(
        "MlpPolicy", "CartPole-v1", seed=0, learning_rate=2.3e-3, learning_starts=1000, train_freq=256, batch_size=64,
        gradient_steps=128, target_update_interval=10, exploration_fraction=0.32, exploration_final_eps=0.04,
        device="cpu", policy_kwargs={"features_extractor_class": Extractor, "net_arch": []},
    )  # fmt: skip
    model.learn(5_000)
    online, target = model.q_net, model.q_net_target
    assert folds(online) == {model._n_updates}
    assert folds(target) == {0}, "its weights are copied, not learned"
    model._n_calls = model.target_update_interval - 1
    model._on_step()  # it is updated once more
    states, theirs = model.replay_buffer.sample(64).observations, target.state_dict()
    for name, value in online.state_dict().items():
        if "counter_" not in name:  # whole numbers, which are not copied, and which testing does without
            torch.testing.assert_close(theirs[name], value)
    with torch.no_grad():
        torch.testing.assert_close(target.eval()(states), online.eval()(states))
    length, _ = evaluation.evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    assert length > 60  # an untrained one lasts 9 to 25 steps
