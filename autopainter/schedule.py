"""What changes with the step, as functions of it: nothing here remembers anything."""

from autopainter.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Adam's step size: a linear warm-up, then constant, then a linear fall to 0 after the last step.

    Pix2pix's code keeps it constant for the first half of the training and lets it fall over the second.

    Args:
        step: number of the step, from 0.
    """
    train = config.train
    return train.learning_rate * min((step + 1) / max(train.warmup_steps, 1), 1.0) * _share_left(config, step)


def tv_weight(config: Config, step: int) -> float:
    """Weight of the total variation: constant, then a linear change to ``loss.tv_growth`` times as much.

    Our own: while the learning rate falls, large areas can be evened out without losing colours that were learned.

    Args:
        step: number of the step, from 0.
    """
    left = _share_left(config, step)
    return config.loss.tv_weight * (left + config.loss.tv_growth * (1 - left))


def _share_left(config: Config, step: int) -> float:
    """Share of the learning rate: 1 up to ``train.decay_from``, then a linear fall to 0 after the last step."""
    train = config.train
    if train.decay_from is None or step < train.decay_from:
        return 1.0
    return (train.steps - step) / (train.steps - train.decay_from)


def trains_generator(config: Config, step: int) -> bool:
    """Whether the generator learns in this step, numbered from 0: in the last of each ``loss.critic_steps``."""
    return (step + 1) % config.loss.critic_steps == 0


def generator_updates(config: Config, steps: int) -> int:
    """How often the generator has learned in the first ``steps`` steps."""
    return steps // config.loss.critic_steps


def average_decay(config: Config, step: int) -> float:
    """Decay of the generator's moving average: it grows with the step, so that the random start is forgotten.

    As in TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return min(config.train.ema_decay, (1 + step) / (10 + step))
