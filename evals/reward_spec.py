"""Where ``load_reward`` stood before rewards took it over."""

from align.rewards.named import Reward, load_reward

__all__ = ["Reward", "load_reward"]
